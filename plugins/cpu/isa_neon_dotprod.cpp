// Integer products of aarch64 with the dot product instructions: 32 registers of 4 sums.
#define DMOE_PRODUCTS kNeonDotprod
#define DMOE_NAME "neon-dotprod"
#define DMOE_LANES 4
#define DMOE_PANEL_ROWS 6
#define DMOE_ROWS 2
#define DMOE_TOKENS 2
#define DMOE_FEW 2
#include "integer.inc"
