// Whatever the compiler's default is: SSE2 on x86-64, NEON on aarch64 (32 registers of 4 floats).
#define DMOE_ISA kGeneric
#define DMOE_NAME "generic"
#define DMOE_LANES 4
#define DMOE_ROWS 4
#if defined(__aarch64__)
#define DMOE_TOKENS 4
#define DMOE_PANEL_ROWS 10
#else
#define DMOE_TOKENS 2
#define DMOE_PANEL_ROWS 5
#endif
#define DMOE_INTEGER_ROWS 2
#define DMOE_INTEGER_TOKENS 4
#include "kernel.inc"
