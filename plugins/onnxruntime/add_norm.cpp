// dmoe::DmoeAddNorm on dmoe_add_norm(), for fp16 and bf16.
#include "common.h"

namespace dmoe {
namespace {

constexpr char kName[] = "DmoeAddNorm";

struct Kernel {
    int32_t type; // DMOE_TYPE_*
    float eps;

    OrtStatus* ComputeV2(OrtKernelContext* context) const noexcept
    {
        return guarded(kName, [&] { compute(context); });
    }

    void compute(OrtKernelContext* context) const
    {
        Input const x(context, 0, "x"), delta(context, 1, "delta"), weight(context, 2, "weight");
        x.expect({-1, -1});
        DmoeAddNormShape const shape{x.size(0), x.size(1), type};
        delta.expect({shape.tokens, shape.hidden});
        weight.expect({shape.hidden});
        auto* const total = output<void>(context, 0, {shape.tokens, shape.hidden});
        auto* const normed = output<void>(context, 1, {shape.tokens, shape.hidden});
        check(dmoe_add_norm(&shape, eps, x.data<void>(), delta.data<void>(), weight.data<void>(), total, normed,
            stream(context)));
    }
};

struct Op : SessionOp<Op, Kernel> {
    Op(DmoeSession* session, int32_t type) : SessionOp(session), type(type) {}

    char const* GetName() const { return kName; }
    size_t GetInputTypeCount() const { return 3; }
    size_t GetOutputTypeCount() const { return 2; }

    ONNXTensorElementDataType GetInputType(size_t) const
    {
        return type == DMOE_TYPE_BF16 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
    }

    ONNXTensorElementDataType GetOutputType(size_t index) const { return GetInputType(index); }

    Kernel* makeKernel(OrtKernelInfo const* info) const
    {
        return new Kernel{type, Ort::ConstKernelInfo(info).GetAttribute<float>("eps")};
    }

    int32_t type; // DMOE_TYPE_*
};

} // namespace

void addAddNorm(Ort::CustomOpDomain& domain, DmoeSession* session)
{
    for (int32_t const type : {DMOE_TYPE_FP16, DMOE_TYPE_BF16}) {
        domain.Add(new Op(session, type));
    }
}

} // namespace dmoe
