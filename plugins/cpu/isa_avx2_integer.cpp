// Integer products of x86-64 with AVX2: three instructions for four products of bytes in each of 8 lanes.
#define DMOE_PRODUCTS kAvx2Integer
#define DMOE_NAME "avx2"
#define DMOE_LANES 8
#define DMOE_PANEL_ROWS 3
#define DMOE_ROWS 2
#define DMOE_TOKENS 2
#define DMOE_FEW 2
#include "integer.inc"
