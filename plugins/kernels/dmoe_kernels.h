/* The C functions of libdmoe_plugins.so (CUDA) and libdmoe_kernels_cpu.so (emulation): one header, same meaning.
 *
 * Semantics: the folders of dmoe_export/ops/; of dmoe_candidates() dmoe_export/runtime/candidates.py.
 * Every pointer is a device pointer (emulation: host pointer), 16-byte aligned, contiguous, and must stay valid until
 * the stream has run the work. Weights may also be pinned host memory, which a device reads at the same address.
 * `stream` is a cudaStream_t; the emulation ignores it. Nothing here waits for the device or allocates, so the calls can
 * be recorded in a CUDA graph.
 *
 * Returned: 0; a negative DMOE_ERROR_*, nothing launched; or a positive cudaError_t of a launch. */
#ifndef DMOE_KERNELS_H
#define DMOE_KERNELS_H

#include <stdint.h>

#if defined(__GNUC__)
#define DMOE_API __attribute__((visibility("default")))
#else
#define DMOE_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum {
    DMOE_ERROR_SHAPE = -1,      /* a size is out of the kernel's limits, see README.md */
    DMOE_ERROR_ATTRIBUTE = -2,  /* an attribute is out of range or does not fit the sizes */
    DMOE_ERROR_TYPE = -3,       /* an unknown element type, or bf16 on a device below compute capability 8.0 */
    DMOE_ERROR_POINTER = -4,    /* a required pointer is NULL or not 16-byte aligned */
    DMOE_ERROR_EMULATION = -5   /* emulation only: a barrier or collective was misused; dmoe_emulation_message() */
};

enum { DMOE_MODE_TOKEN = 0, DMOE_MODE_TOP_P = 1, DMOE_MODE_TOP_C = 2 };
enum { DMOE_TYPE_FP16 = 0, DMOE_TYPE_BF16 = 1 };
enum { DMOE_ACTIVATION_SILU = 0, DMOE_ACTIVATION_GELU_TANH = 1 }; /* of gated experts, dmoe_export/ops/experts/__init__.py */

typedef struct DmoeRouteAttributes {
    int32_t mode;              /* DMOE_MODE_* */
    int32_t block_length;      /* n, 1..256 */
    int32_t experts_per_token; /* k, 1..32, at most E */
    int32_t num_groups;        /* divides E */
    int32_t groups_kept;       /* 1..num_groups */
    int32_t softmax;           /* 1: scores are a softmax, 0: sigmoids */
    int32_t renormalise;       /* 1: divide the weights by their sum */
    float routed_scaling;
} DmoeRouteAttributes;

/* Router logits -> expert ids, weights and the coreset of each token's block. One kernel launch.
 * router_logits [rows, tokens, experts], expert_bias [experts], position_ids [rows, tokens] (-1 = padding),
 * top_p [1], min_experts [1], coreset_size [1]: device memory too; those the mode does not use may be NULL.
 * expert_ids, expert_weights [rows, tokens, k]; coreset [rows, tokens, experts], 0 or 1, may be NULL.
 * rows * tokens may be 0. experts 1..1024, rows at most 65535. */
DMOE_API int dmoe_block_route(const DmoeRouteAttributes *attributes, int32_t rows, int32_t tokens, int32_t experts,
                              const float *router_logits, const float *expert_bias, const int64_t *position_ids,
                              const float *top_p, const int64_t *min_experts, const int64_t *coreset_size,
                              int32_t *expert_ids, float *expert_weights, uint8_t *coreset, void *stream);

typedef struct DmoeRouterShape {
    int32_t rows;    /* B, at most 65535 */
    int32_t tokens;  /* T; rows * tokens may be 0, at most 2^30 */
    int32_t experts; /* E, 1..1024 */
    int32_t hidden;  /* H, a multiple of 8, at most 2^18 */
    int32_t type;    /* DMOE_TYPE_* of hidden */
} DmoeRouterShape;

/* Bytes of the workspace dmoe_router() needs for this shape, or a negative DMOE_ERROR_*: 4 * rows * tokens * experts. */
DMOE_API int64_t dmoe_router_workspace_bytes(const DmoeRouterShape *shape);

/* Router logits = hidden [rows * tokens, H] x router_weight [experts, H] (float32) in float32, then dmoe_block_route() on
 * them, whose further arguments are those of the same names. router_logits [rows, tokens, experts] may be NULL.
 * workspace: dmoe_router_workspace_bytes() bytes, 256-byte aligned, contents irrelevant. Two kernel launches. A token's
 * logits have the same bits whatever the other tokens are. router_weight is a constant: it may be read before work queued
 * just before has ended. */
DMOE_API int dmoe_router(const DmoeRouterShape *shape, const DmoeRouteAttributes *attributes, const void *hidden,
                         const float *router_weight, const float *expert_bias, const int64_t *position_ids,
                         const float *top_p, const int64_t *min_experts, const int64_t *coreset_size,
                         int32_t *expert_ids, float *expert_weights, float *router_logits, void *workspace,
                         void *stream);

typedef struct DmoeAddNormShape {
    int32_t tokens; /* N, may be 0 */
    int32_t hidden; /* H, a multiple of 8, at most 2^18 */
    int32_t type;   /* DMOE_TYPE_* of all tensors */
} DmoeAddNormShape;

/* total = x + delta, rounded; normed = total / sqrt(mean(total^2) + eps) * weight, float32 inside. x, delta, total, normed
 * [N, H], weight [H]; total may be x or delta, normed may be none of the others. One kernel launch. weight is a constant,
 * as router_weight is. */
DMOE_API int dmoe_add_norm(const DmoeAddNormShape *shape, float eps, const void *x, const void *delta, const void *weight,
                           void *total, void *normed, void *stream);

typedef struct DmoeExpertsShape {
    int32_t tokens;  /* N, may be 0 */
    int32_t places;  /* k, 1..32 */
    int32_t experts; /* E, 1..1024 */
    int32_t hidden;  /* H, a multiple of 8 */
    int32_t width;   /* I' (one expert's intermediate width as stored), a multiple of 8 */
    int32_t type;    /* DMOE_TYPE_* of hidden, gate_up, down and mixed */
    int32_t activation; /* DMOE_ACTIVATION_* */
} DmoeExpertsShape;

/* Bytes of the workspace dmoe_experts() needs for this shape, or a negative DMOE_ERROR_*. Grows with tokens. */
DMOE_API int64_t dmoe_experts_workspace_bytes(const DmoeExpertsShape *shape);

/* Mixture of the experts: hidden [N, H], expert_ids [N, k] (outside 0..E-1 = none), expert_weights [N, k] float32,
 * gate_up [E, 2I', H] (rows interleaved: 2i gate, 2i+1 up), down [E, H, I'], mixed [N, H].
 * workspace: dmoe_experts_workspace_bytes() bytes, 256-byte aligned, contents irrelevant before and after. */
DMOE_API int dmoe_experts(const DmoeExpertsShape *shape, const void *hidden, const int32_t *expert_ids,
                          const float *expert_weights, const void *gate_up, const void *down, void *mixed,
                          void *workspace, void *stream);

/* The fast tier of a layer's experts: copies of some of them in device memory. Read when the kernels run, not when they
 * are launched, so a recorded graph follows later changes of the table and of the slots. */
typedef struct DmoeExpertPool {
    int32_t slots;                 /* 1..experts */
    const int32_t *slot_of_expert; /* [E]; outside 0..slots-1 = not in the pool */
    const void *gate_up;           /* [slots, 2I', H] */
    const void *down;              /* [slots, H, I'] */
} DmoeExpertPool;

/* dmoe_experts() that reads an expert from its slot of the pool, and from gate_up and down (the slow tier, usually pinned
 * host memory) only if it has none. The same bits for every table as long as a slot holds its expert's weights.
 * pool: host memory, read before this returns; NULL = dmoe_experts(). */
DMOE_API int dmoe_experts_resident(const DmoeExpertsShape *shape, const DmoeExpertPool *pool, const void *hidden,
                                   const int32_t *expert_ids, const float *expert_weights, const void *gate_up,
                                   const void *down, void *mixed, void *workspace, void *stream);

/* Weights as integers: u stored unsigned, the weight is (u - 2^(bits - 1)) * scale rounded to the type of hidden. Groups
 * of group_size neighbours of a row share a scale, whose type is that of hidden. Weights and scales lie in fragment order,
 * which dmoe_export/ops/experts/fragments.py defines, and in no other. */
typedef struct DmoeQuantisation {
    int32_t bits;                    /* 4 or 8 */
    int32_t group_size;              /* 32, 64 or 128; divides H and I' */
    const void *gate_up_scales;      /* [E, 2I' / 16, H / group_size, 16] */
    const void *down_scales;         /* [E, H / 16, I' / group_size, 16] */
    const void *gate_up_pool_scales; /* [slots, ...] of the pool; NULL without one */
    const void *down_pool_scales;
} DmoeQuantisation;

/* dmoe_experts_resident() with integer weights: gate_up and down, also those of the pool, are uint8 in fragment order, as
 * many bytes as rows of bits * H / 8 and bits * I' / 8 would be. quantisation: host memory, read before this returns; NULL = dmoe_experts_resident(). */
DMOE_API int dmoe_experts_quantised(const DmoeExpertsShape *shape, const DmoeQuantisation *quantisation,
                                    const DmoeExpertPool *pool, const void *hidden, const int32_t *expert_ids,
                                    const float *expert_weights, const void *gate_up, const void *down, void *mixed,
                                    void *workspace, void *stream);

typedef struct DmoeSelfAttentionShape {
    int32_t rows;         /* B, may be 0 */
    int32_t tokens;       /* T, may be 0 */
    int32_t past;         /* S, at least 1 */
    int32_t heads;        /* Hq, a multiple of Hkv */
    int32_t kv_heads;     /* Hkv */
    int32_t head_dim;     /* D, a multiple of 8 up to 256 */
    int32_t rotary_dim;   /* R, even, 2..D */
    int32_t block_length; /* 0 = every token sees every place */
    int32_t type;         /* DMOE_TYPE_* of all but angles and positions */
    float eps;            /* of the norms of heads, above 0 */
} DmoeSelfAttentionShape;

/* Bytes of the workspace dmoe_self_attention() needs for this shape and every one of fewer rows, tokens and past places,
 * or a negative DMOE_ERROR_*. */
DMOE_API int64_t dmoe_self_attention_workspace_bytes(const DmoeSelfAttentionShape *shape);

/* Semantics: dmoe_export/ops/self_attention/__init__.py. qkv [B*T, (Hq + 2 Hkv) D], cos and sin [B, T, R / 2] float32,
 * position_ids [B, T], past_positions [B, S] (-1: a place nobody sees; positions from 2^32 - 2 on are one), past_key and
 * past_value [B, Hkv, S, D], q_norm and k_norm [D], both NULL = no norm of heads; mixed [B*T, Hq D], key and value
 * [B, Hkv, T, D]. Sizes times each other must stay below 2^31 blocks and heads. workspace as in dmoe_experts().
 * Rounded to 16 bits: q, key, the weights exp(score - largest score) as operand of the tensor cores, mixed. A row that sees
 * no place is 0. What lies in a place whose position is -1 does not matter; a value that is NaN or infinite in a place that
 * some tokens see may make NaN of tokens that do not see it. Two kernel launches. */
DMOE_API int dmoe_self_attention(const DmoeSelfAttentionShape *shape, const void *qkv, const float *cos, const float *sin,
                                 const int64_t *position_ids, const int64_t *past_positions, const void *past_key,
                                 const void *past_value, const void *q_norm, const void *k_norm, void *mixed, void *key,
                                 void *value, void *workspace, void *stream);

/* The expert that every token takes with weight 1: floats of the shape's type, also where the others are integers. */
typedef struct DmoeSharedExpert {
    int32_t width;       /* Is, a multiple of 8; may differ from I' */
    const void *gate_up; /* [2Is, H]: all gate rows, then all up rows (not interleaved) */
    const void *down;    /* [H, Is] */
} DmoeSharedExpert;

/* Bytes of the workspace dmoe_mixture() needs, or a negative DMOE_ERROR_*. shared = NULL: dmoe_experts_workspace_bytes(). */
DMOE_API int64_t dmoe_mixture_workspace_bytes(const DmoeExpertsShape *shape, const DmoeSharedExpert *shared);

/* dmoe_experts_quantised() plus a shared expert (dmoe_export/ops/mixture/__init__.py): its output is the last summand, in
 * float32, and the sum is rounded once. shared: host memory, read before this returns; NULL = dmoe_experts_quantised().
 * A pool and integers concern the other experts only. As many launches as without. */
DMOE_API int dmoe_mixture(const DmoeExpertsShape *shape, const DmoeSharedExpert *shared,
                          const DmoeQuantisation *quantisation, const DmoeExpertPool *pool, const void *hidden,
                          const int32_t *expert_ids, const float *expert_weights, const void *gate_up, const void *down,
                          void *mixed, void *workspace, void *stream);

typedef struct DmoeHeadShape {
    int32_t rows;       /* B */
    int32_t tokens;     /* T, of a row */
    int32_t wanted;     /* M, places of a row of logit_rows; B * M may be 0, else T is at least 1 */
    int32_t kept;       /* L, 0..M: places of a row whose logits are written */
    int32_t hidden;     /* H, a multiple of 8, at most 2^18 */
    int32_t vocabulary; /* V, 2..2^24 */
    int32_t type;       /* DMOE_TYPE_* of hidden, norm and weight */
} DmoeHeadShape;

typedef struct DmoeHeadAttributes {
    float eps;       /* of the norm */
    int32_t mask_id; /* the token that is never an answer; outside 0..V-1: every token may be one */
} DmoeHeadAttributes;

/* Bytes of the workspace dmoe_head() needs for this shape, or a negative DMOE_ERROR_*. */
DMOE_API int64_t dmoe_head_workspace_bytes(const DmoeHeadShape *shape);

/* The vocabulary head: hidden [B * T, H], norm [H], weight [V, H], logit_rows [B, M] (below 0: place 0, above T-1: T-1)
 * -> token_ids [B, M], confidence [B, M], logits [B, L, V] (may be NULL when L is 0). A logit that is NaN is above all
 * others; where the best logit is NaN or infinite, the confidence is NaN. Three launches per 1024 wanted tokens.
 * B * T and B * M at most 2^30. workspace: dmoe_head_workspace_bytes() bytes, 256-byte aligned, contents irrelevant. */
DMOE_API int dmoe_head(const DmoeHeadShape *shape, const DmoeHeadAttributes *attributes, const void *hidden,
                       const void *norm, const void *weight, const int64_t *logit_rows, int64_t *token_ids,
                       float *confidence, float *logits, void *workspace, void *stream);

typedef struct DmoeCandidatesShape {
    int32_t rows;       /* B */
    int32_t wanted;     /* M, places of a row whose candidates are wanted; B * M may be 0 */
    int32_t kept;       /* L, M or more: places of a row that have logits */
    int32_t vocabulary; /* V, 2..2^24 */
    int32_t candidates; /* K, 1..1024 */
} DmoeCandidatesShape;

/* Bytes of the workspace dmoe_candidates() needs for this shape, or a negative DMOE_ERROR_*. */
DMOE_API int64_t dmoe_candidates_workspace_bytes(const DmoeCandidatesShape *shape);

/* The K best tokens of each place: logits [B, L, V] -> token_ids and values [B, M, K], best first. Equal logits: the lower
 * token first; NaN is above all; mask_id is no candidate (outside 0..V-1: every token may be one). Where there are fewer
 * than K tokens, id -1 and value minus infinity fill the rest. Two launches; for M places of V logits B * M * V / 128 at
 * most 2^30 where V is up to 2^18. workspace: dmoe_candidates_workspace_bytes() bytes, 256-byte aligned, contents
 * irrelevant. */
DMOE_API int dmoe_candidates(const DmoeCandidatesShape *shape, int32_t mask_id, const float *logits, int32_t *token_ids,
                             float *values, void *workspace, void *stream);

/* What a returned code means, one sentence; a static string. */
DMOE_API const char *dmoe_error_string(int code);

/* First 16 hex digits of the sha256 of the kernel and adapter sources this library was built from. */
DMOE_API const char *dmoe_build_id(void);

#ifdef __cplusplus
}
#endif

#endif
