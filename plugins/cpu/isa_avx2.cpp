// x86-64 with AVX2, FMA and F16C: 16 registers of 8 floats.
#define DMOE_ISA kAvx2
#define DMOE_NAME "avx2"
#define DMOE_LANES 8
#define DMOE_ROWS 6
#define DMOE_TOKENS 2
#define DMOE_INTEGER_ROWS 2
#define DMOE_INTEGER_TOKENS 4
#define DMOE_PANEL_ROWS 5
#include "kernel.inc"
