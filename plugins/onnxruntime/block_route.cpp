// dmoe::DmoeBlockRoute on dmoe_block_route().
#include "route_attributes.h"

namespace dmoe {
namespace {

constexpr char kName[] = "DmoeBlockRoute";

struct Kernel {
    DmoeRouteAttributes attributes;

    OrtStatus* ComputeV2(OrtKernelContext* context) const noexcept
    {
        return guarded(kName, [&] { compute(context); });
    }

    void compute(OrtKernelContext* context) const
    {
        Input const logits(context, 0, "router_logits"), bias(context, 1, "expert_bias");
        Input const positions(context, 2, "position_ids"), topP(context, 3, "top_p");
        Input const minExperts(context, 4, "min_experts"), coresetSize(context, 5, "coreset_size");
        logits.expect({-1, -1, -1});
        int32_t const rows = logits.size(0), tokens = logits.size(1), experts = logits.size(2);
        bias.expect({experts});
        positions.expect({rows, tokens});
        for (Input const* setting : {&topP, &minExperts, &coresetSize}) {
            setting->expect({1});
        }
        auto* const ids = output<int32_t>(context, 0, {rows, tokens, attributes.experts_per_token});
        auto* const weights = output<float>(context, 1, {rows, tokens, attributes.experts_per_token});
        auto* const coreset = output<uint8_t>(context, 2, {rows, tokens, experts});
        check(dmoe_block_route(&attributes, rows, tokens, experts, logits.data<float>(), bias.data<float>(),
            positions.data<int64_t>(), topP.data<float>(), minExperts.data<int64_t>(), coresetSize.data<int64_t>(), ids,
            weights, coreset, stream(context)));
    }
};

struct Op : SessionOp<Op, Kernel> {
    using SessionOp::SessionOp;

    char const* GetName() const { return kName; }
    size_t GetInputTypeCount() const { return 6; }
    size_t GetOutputTypeCount() const { return 3; }

    ONNXTensorElementDataType GetInputType(size_t index) const
    {
        bool const integers = index == 2 || index >= 4;
        return integers ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    }

    ONNXTensorElementDataType GetOutputType(size_t index) const
    {
        constexpr ONNXTensorElementDataType kTypes[] = {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32,
            ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL};
        return kTypes[index];
    }

    // The model does not use the coreset; then it is not written.
    OrtCustomOpInputOutputCharacteristic GetOutputCharacteristic(size_t index) const
    {
        return index == 2 ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
    }

    Kernel* makeKernel(OrtKernelInfo const* info) const { return new Kernel{routeAttributesOf(Ort::ConstKernelInfo(info))}; }
};

} // namespace

void addBlockRoute(Ort::CustomOpDomain& domain, DmoeSession* session)
{
    domain.Add(new Op(session));
}

} // namespace dmoe
