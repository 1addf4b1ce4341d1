// For x86-64 processors with AVX-512: 32 registers of 8 doubles.
#include "includes.h"

#if defined(EBFT_X86)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,f16c,prefer-vector-width=512")
#define EBFT_ISA avx512
#define EBFT_LANES 8
#define EBFT_WHOLE 6
#define EBFT_BLOCK 4
#define EBFT_ROWS 12
#include "kernels_of_isa.h"
#pragma GCC pop_options
#endif
