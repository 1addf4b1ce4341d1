// For the instruction set that every processor of the architecture has.
#include "includes.h"

#define EBFT_ISA baseline
#define EBFT_LANES 2
#define EBFT_WHOLE 4
#define EBFT_BLOCK 3
#define EBFT_ROWS 6
#include "kernels_of_isa.h"
