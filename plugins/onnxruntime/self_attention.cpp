// dmoe::DmoeSelfAttention on dmoe_self_attention(), for fp16 and bf16, with norms of heads and without.
#include "scratch.h"

namespace dmoe {
namespace {

constexpr char kName[] = "DmoeSelfAttention";

class Kernel {
public:
    Kernel(OrtKernelInfo const* info, int32_t type) : mType(type), mScratch(info)
    {
        Ort::ConstKernelInfo const attributes(info);
        int64_t const blockLength = attributes.GetAttribute<int64_t>("block_length");
        int64_t const headNorm = attributes.GetAttribute<int64_t>("head_norm");
        mEps = attributes.GetAttribute<float>("eps");
        if (blockLength < 0 || blockLength > std::numeric_limits<int32_t>::max()) {
            throw std::runtime_error("attribute block_length is " + std::to_string(blockLength)
                + " where 0 (full attention) or a positive int32 is needed.");
        }
        if (headNorm != 0 && headNorm != 1) {
            throw std::runtime_error("attribute head_norm is " + std::to_string(headNorm) + " where 0 or 1 is needed.");
        }
        mBlockLength = static_cast<int32_t>(blockLength);
        mHeadNorm = headNorm == 1;
    }

    OrtStatus* ComputeV2(OrtKernelContext* context) const noexcept
    {
        return guarded(kName, [&] { compute(context); });
    }

private:
    void compute(OrtKernelContext* context) const
    {
        Input const qkv(context, 0, "qkv"), cos(context, 1, "cos"), sin(context, 2, "sin");
        Input const positions(context, 3, "position_ids"), pastPositions(context, 4, "past_positions");
        Input const pastKey(context, 5, "past_key"), pastValue(context, 6, "past_value");
        DmoeSelfAttentionShape shape{};
        positions.expect({-1, -1});
        shape.rows = positions.size(0);
        shape.tokens = positions.size(1);
        pastKey.expect({shape.rows, -1, -1, -1});
        shape.kv_heads = pastKey.size(1);
        shape.past = pastKey.size(2);
        shape.head_dim = pastKey.size(3);
        pastValue.expect({shape.rows, shape.kv_heads, shape.past, shape.head_dim});
        pastPositions.expect({shape.rows, shape.past});
        qkv.expect({int64_t{shape.rows} * shape.tokens, -1});
        if (shape.head_dim < 1 || qkv.size(1) % shape.head_dim != 0) {
            throw std::runtime_error("qkv has rows of " + std::to_string(qkv.size(1))
                + " where a multiple of the head dimension " + std::to_string(shape.head_dim) + " is needed.");
        }
        shape.heads = qkv.size(1) / shape.head_dim - 2 * shape.kv_heads;
        cos.expect({shape.rows, shape.tokens, 1, -1});
        shape.rotary_dim = 2 * cos.size(3);
        sin.expect({shape.rows, shape.tokens, 1, cos.size(3)});
        shape.block_length = mBlockLength;
        shape.type = mType;
        shape.eps = mEps;
        void const *queryNorm = nullptr, *keyNorm = nullptr;
        if (mHeadNorm) {
            Input const q(context, 7, "q_norm"), k(context, 8, "k_norm");
            q.expect({shape.head_dim});
            k.expect({shape.head_dim});
            queryNorm = q.data<void>();
            keyNorm = k.data<void>();
        }

        int64_t const bytes = dmoe_self_attention_workspace_bytes(&shape);
        check(bytes < 0 ? bytes : 0);
        int64_t const heads = shape.kv_heads, dim = shape.head_dim;
        auto* const mixed = output<void>(context, 0, {int64_t{shape.rows} * shape.tokens, shape.heads * dim});
        auto* const key = output<void>(context, 1, {shape.rows, heads, shape.tokens, dim});
        auto* const value = output<void>(context, 2, {shape.rows, heads, shape.tokens, dim});
        if (shape.rows == 0 || shape.tokens == 0) {
            return; // no tensor has an address then
        }
        Workspace const workspace(context, mScratch, bytes);
        check(dmoe_self_attention(&shape, qkv.data<void>(), cos.data<float>(), sin.data<float>(),
            positions.data<int64_t>(), pastPositions.data<int64_t>(), pastKey.data<void>(), pastValue.data<void>(),
            queryNorm, keyNorm, mixed, key, value, workspace.data(), stream(context)));
    }

    int32_t mType, mBlockLength = 0;
    float mEps = 0;
    bool mHeadNorm = false;
    Scratch mScratch;
};

struct Op : SessionOp<Op, Kernel> {
    Op(DmoeSession* session, int32_t type) : SessionOp(session), type(type) {}

    char const* GetName() const { return kName; }
    size_t GetInputTypeCount() const { return 9; }
    size_t GetOutputTypeCount() const { return 3; }

    ONNXTensorElementDataType half() const
    {
        return type == DMOE_TYPE_BF16 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
    }

    ONNXTensorElementDataType GetInputType(size_t index) const
    {
        switch (index) {
        case 1:
        case 2: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
        case 3:
        case 4: return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
        default: return half();
        }
    }

    ONNXTensorElementDataType GetOutputType(size_t) const { return half(); }

    // The norms of heads are there with head_norm only.
    OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(size_t index) const
    {
        return index >= 7 ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
    }

    Kernel* makeKernel(OrtKernelInfo const* info) const { return new Kernel(info, type); }

    int32_t type; // DMOE_TYPE_*
};

} // namespace

void addSelfAttention(Ort::CustomOpDomain& domain, DmoeSession* session)
{
    for (int32_t const type : {DMOE_TYPE_FP16, DMOE_TYPE_BF16}) {
        domain.Add(new Op(session, type));
    }
}

} // namespace dmoe
