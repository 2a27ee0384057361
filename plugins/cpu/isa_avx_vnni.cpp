// Integer products of x86-64 with AVX-VNNI: four products of bytes are one instruction in each of 8 lanes.
#define DMOE_PRODUCTS kAvxVnni
#define DMOE_NAME "avx-vnni"
#define DMOE_LANES 8
#define DMOE_PANEL_ROWS 3
#define DMOE_ROWS 2
#define DMOE_TOKENS 2
#define DMOE_FEW 2
#include "integer.inc"
