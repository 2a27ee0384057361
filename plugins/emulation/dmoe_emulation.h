/* C functions only libdmoe_kernels_cpu.so has, for its tests. */
#ifndef DMOE_EMULATION_H
#define DMOE_EMULATION_H

#include "../kernels/dmoe_kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

/* 0 (also the start value, unless the environment variable DMOE_EMULATION_SEED says otherwise): threads and blocks run
 * in index order. Anything else: in an order drawn from the seed; seeds with bit 1 let one warp run far ahead of the
 * others, the rest mix all threads. Shared memory starts as 0xff bytes (float NaN) for
 * even seeds, as 0xcc bytes for odd ones. */
DMOE_API void dmoe_emulation_seed(uint64_t seed);

/* Shared memory of a thread block: 65536 as compute capability 7.5, 101376 as 8.6 and 12.0, 166912 as 8.0; 0 = 232448, as
 * 9.0. A processor has 1 KiB more. */
DMOE_API void dmoe_emulation_shared_bytes(int32_t bytes);

/* Whether the emulated device has bulk copies, as compute capability 9.0 and newer ones; at the start it has. */
DMOE_API void dmoe_emulation_bulk_copies(int32_t there);

/* How many kernels have been launched so far. */
DMOE_API int64_t dmoe_emulation_launches(void);

/* The ring in shared memory that the products of `bits` bits take on the emulated device, with `tiles` tiles of eight tokens
 * per pass (4 or 8), beside the lists of so many experts and pairs: stages, bytes of weights in each, thread blocks per
 * processor. A negative DMOE_ERROR_* where none fits. */
DMOE_API int dmoe_emulation_ring(int32_t bits, int32_t tiles, int32_t experts, int32_t pairs, int32_t *ring);

/* Byte of a stage of 4 tiles where a row's unit of weights (kind 0) or of tokens (1) is; of integers, where a band's block of
 * weights (0) or group of scales (2) is. */
DMOE_API int dmoe_emulation_place(int32_t kind, int32_t bits, int32_t row, int32_t unit);

/* How the experts op cuts a call on the emulated device: whether the product for many tokens multiplies (1), tokens of a
 * chunk, outputs of a launch of down, stages of that product's ring. */
DMOE_API int dmoe_emulation_plan(const DmoeExpertsShape *shape, int32_t bits, int32_t *plan);

/* Byte in a plane of tokens, or in the 16-bit weights, of a stage of the product for many tokens. */
DMOE_API int dmoe_emulation_large_place(int32_t row, int32_t unit);

/* Why the last call returned DMOE_ERROR_EMULATION; empty when it did not. */
DMOE_API const char *dmoe_emulation_message(void);

/* Runs the small kernel `name` of selftest.cpp, which fills `out` (64 floats); DMOE_ERROR_SHAPE for an unknown name. */
DMOE_API int dmoe_emulation_selftest(const char *name, float *out);

/* Runs the small kernel `name` of selftest_copies.cpp on 1024 words; `out` as above. */
DMOE_API int dmoe_emulation_copies(const char *name, const uint32_t *words, float *out);

/* The same with the kernel of selftest_arrivals.cpp. */
DMOE_API int dmoe_emulation_arrivals(const char *name, const uint32_t *words, float *out);

/* c [16, 8] += a [16, 16] · b [8, 16]ᵀ with one mma; type: DMOE_TYPE_*. */
DMOE_API int dmoe_emulation_mma(const uint16_t *a, const uint16_t *b, float *c, int32_t type);

/* Rounds floats to halfs as the kernels do. */
DMOE_API void dmoe_emulation_narrow(const float *values, uint16_t *halfs, int64_t count, int32_t type);

#ifdef __cplusplus
}
#endif

#endif
