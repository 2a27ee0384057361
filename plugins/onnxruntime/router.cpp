// dmoe::DmoeRouter on dmoe_router(), for fp16 and bf16.
#include "route_attributes.h"
#include "scratch.h"

namespace dmoe {
namespace {

constexpr char kName[] = "DmoeRouter";

class Kernel {
public:
    Kernel(OrtKernelInfo const* info, int32_t type)
        : mType(type), mAttributes(routeAttributesOf(Ort::ConstKernelInfo(info))), mScratch(info)
    {
    }

    OrtStatus* ComputeV2(OrtKernelContext* context) const noexcept
    {
        return guarded(kName, [&] { compute(context); });
    }

private:
    void compute(OrtKernelContext* context) const
    {
        Input const hidden(context, 0, "hidden"), weight(context, 1, "router_weight"), bias(context, 2, "expert_bias");
        Input const positions(context, 3, "position_ids"), topP(context, 4, "top_p");
        Input const minExperts(context, 5, "min_experts"), coresetSize(context, 6, "coreset_size");
        positions.expect({-1, -1});
        hidden.expect({-1, -1});
        DmoeRouterShape shape{};
        shape.rows = positions.size(0);
        shape.tokens = positions.size(1);
        shape.hidden = hidden.size(1);
        shape.type = mType;
        int64_t const tokens = int64_t{shape.rows} * shape.tokens;
        hidden.expect({tokens, shape.hidden});
        weight.expect({-1, shape.hidden});
        shape.experts = weight.size(0);
        bias.expect({shape.experts});
        for (Input const* setting : {&topP, &minExperts, &coresetSize}) {
            setting->expect({1});
        }
        int64_t const bytes = dmoe_router_workspace_bytes(&shape);
        check(bytes < 0 ? bytes : 0);
        auto* const ids = output<int32_t>(context, 0, {tokens, mAttributes.experts_per_token});
        auto* const weights = output<float>(context, 1, {tokens, mAttributes.experts_per_token});
        auto* const logits = output<float>(context, 2, {shape.rows, shape.tokens, shape.experts});
        Workspace const workspace(context, mScratch, bytes);
        check(dmoe_router(&shape, &mAttributes, hidden.data<void>(), weight.data<float>(), bias.data<float>(),
            positions.data<int64_t>(), topP.data<float>(), minExperts.data<int64_t>(), coresetSize.data<int64_t>(), ids,
            weights, logits, workspace.data(), stream(context)));
    }

    int32_t mType; // DMOE_TYPE_*
    DmoeRouteAttributes mAttributes;
    Scratch mScratch;
};

struct Op : SessionOp<Op, Kernel> {
    Op(DmoeSession* session, int32_t type) : SessionOp(session), type(type) {}

    char const* GetName() const { return kName; }
    size_t GetInputTypeCount() const { return 7; }
    size_t GetOutputTypeCount() const { return 3; }

    ONNXTensorElementDataType GetInputType(size_t index) const
    {
        if (index == 0) {
            return type == DMOE_TYPE_BF16 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
        }
        bool const integers = index == 3 || index >= 5;
        return integers ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    }

    ONNXTensorElementDataType GetOutputType(size_t index) const
    {
        return index == 0 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    }

    // The model does not use the logits; then they stay in the workspace.
    OrtCustomOpInputOutputCharacteristic GetOutputCharacteristic(size_t index) const
    {
        return index == 2 ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
    }

    Kernel* makeKernel(OrtKernelInfo const* info) const { return new Kernel(info, type); }

    int32_t type; // DMOE_TYPE_*
};

} // namespace

void addRouter(Ort::CustomOpDomain& domain, DmoeSession* session)
{
    for (int32_t const type : {DMOE_TYPE_FP16, DMOE_TYPE_BF16}) {
        domain.Add(new Op(session, type));
    }
}

} // namespace dmoe
