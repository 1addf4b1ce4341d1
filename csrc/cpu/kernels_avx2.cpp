// For x86-64 processors with AVX2, FMA and F16C: 16 registers of 4 doubles.
#include "includes.h"

#if defined(EBFT_X86)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define EBFT_ISA avx2
#define EBFT_LANES 4
#define EBFT_WHOLE 5
#define EBFT_BLOCK 3
#define EBFT_ROWS 6
#include "kernels_of_isa.h"
#pragma GCC pop_options
#endif
