// Integer products of x86-64 with AVX512-VNNI: four products of bytes are one instruction in each of 16 lanes.
#define DMOE_PRODUCTS kAvx512Vnni
#define DMOE_NAME "avx512-vnni"
#define DMOE_LANES 16
#define DMOE_PANEL_ROWS 6
#define DMOE_ROWS 4
#define DMOE_TOKENS 2
#define DMOE_FEW 2
#include "integer.inc"
