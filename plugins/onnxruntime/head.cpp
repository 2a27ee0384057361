// dmoe::DmoeHead on dmoe_head(), for fp16 and bf16.
#include "scratch.h"

namespace dmoe {
namespace {

constexpr char kName[] = "DmoeHead";

class Kernel {
public:
    Kernel(OrtKernelInfo const* info, int32_t type) : mType(type), mScratch(info)
    {
        Ort::ConstKernelInfo const attributes(info);
        mAttributes.eps = attributes.GetAttribute<float>("eps");
        auto const mask = attributes.GetAttribute<int64_t>("mask_id");
        if (mask < std::numeric_limits<int32_t>::min() || mask > std::numeric_limits<int32_t>::max()) {
            throw std::runtime_error("attribute mask_id is " + std::to_string(mask) + ", not an int32.");
        }
        mAttributes.mask_id = static_cast<int32_t>(mask);
    }

    OrtStatus* ComputeV2(OrtKernelContext* context) const noexcept
    {
        return guarded(kName, [&] { compute(context); });
    }

private:
    void compute(OrtKernelContext* context) const
    {
        Input const hidden(context, 0, "hidden"), norm(context, 1, "norm"), weight(context, 2, "weight");
        Input const rows(context, 3, "logit_rows"), kept(context, 4, "logits_kept");
        hidden.expect({-1, -1});
        rows.expect({-1, -1});
        kept.expect({-1});
        DmoeHeadShape shape{};
        shape.hidden = hidden.size(1);
        norm.expect({shape.hidden});
        weight.expect({-1, shape.hidden});
        shape.rows = rows.size(0);
        shape.wanted = rows.size(1);
        shape.kept = kept.size(0);
        shape.vocabulary = weight.size(0);
        shape.type = mType;
        shape.tokens = shape.rows > 0 ? hidden.size(0) / shape.rows : 0;
        if (int64_t{shape.tokens} * shape.rows != hidden.size(0)) {
            throw std::runtime_error("hidden has " + std::to_string(hidden.size(0)) + " tokens, no multiple of the "
                + std::to_string(shape.rows) + " rows of logit_rows.");
        }
        if (shape.kept > shape.wanted) {
            throw std::runtime_error("logits_kept has " + std::to_string(shape.kept) + " places, logit_rows only "
                + std::to_string(shape.wanted) + ".");
        }
        int64_t const bytes = dmoe_head_workspace_bytes(&shape);
        check(bytes < 0 ? bytes : 0);
        auto* const ids = output<int64_t>(context, 0, {shape.rows, shape.wanted});
        auto* const confidence = output<float>(context, 1, {shape.rows, shape.wanted});
        auto* const logits = output<float>(context, 2, {shape.rows, shape.kept, shape.vocabulary});
        if (shape.rows == 0 || shape.wanted == 0) {
            return; // no tensor has an address then
        }
        Workspace const workspace(context, mScratch, bytes);
        check(dmoe_head(&shape, &mAttributes, hidden.data<void>(), norm.data<void>(), weight.data<void>(),
            rows.data<int64_t>(), ids, confidence, logits, workspace.data(), stream(context)));
    }

    int32_t mType; // DMOE_TYPE_*
    DmoeHeadAttributes mAttributes{};
    Scratch mScratch;
};

struct Op : SessionOp<Op, Kernel> {
    Op(DmoeSession* session, int32_t type) : SessionOp(session), type(type) {}

    char const* GetName() const { return kName; }
    size_t GetInputTypeCount() const { return 5; }
    size_t GetOutputTypeCount() const { return 3; }

    ONNXTensorElementDataType GetInputType(size_t index) const
    {
        return index >= 3                ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64
            : type == DMOE_TYPE_BF16 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16
                                     : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
    }

    ONNXTensorElementDataType GetOutputType(size_t index) const
    {
        return index == 0 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    }

    Kernel* makeKernel(OrtKernelInfo const* info) const { return new Kernel(info, type); }

    int32_t type; // DMOE_TYPE_*
};

} // namespace

void addHead(Ort::CustomOpDomain& domain, DmoeSession* session)
{
    for (int32_t const type : {DMOE_TYPE_FP16, DMOE_TYPE_BF16}) {
        domain.Add(new Op(session, type));
    }
}

} // namespace dmoe
