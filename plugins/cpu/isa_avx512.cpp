// x86-64 with AVX-512F/BW/DQ/VL: 32 registers of 16 floats.
#define DMOE_ISA kAvx512
#define DMOE_NAME "avx512"
#define DMOE_LANES 16
#define DMOE_ROWS 8
#define DMOE_TOKENS 3
#define DMOE_INTEGER_ROWS 4
#define DMOE_INTEGER_TOKENS 6
#define DMOE_PANEL_ROWS 10
#include "kernel.inc"
