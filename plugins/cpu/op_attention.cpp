// dmoe::DmoeAttention for ONNX Runtime's CPU provider.
#include "op.h"

#include "attention.h"

namespace dmoe {
namespace {

class Kernel {
public:
    explicit Kernel(ONNXTensorElementDataType values) : mValues(values) {}

    OrtStatus* ComputeV2(OrtKernelContext* context) noexcept
    {
        return guarded("DmoeAttention", [&] { compute(context); });
    }

private:
    void compute(OrtKernelContext* context) const
    {
        Input const q(context, 0, "q"), key(context, 1, "key"), value(context, 2, "value"), pastKey(context, 3, "past_key"),
            pastValue(context, 4, "past_value"), bias(context, 5, "bias");
        q.expect({-1, -1, -1, -1});
        cpu::Attention call{};
        call.values = weightFormat(mValues, 0);
        call.rows = q.size(0);
        call.heads = q.size(1);
        call.columns = q.size(3);
        key.expect({call.rows, call.heads, -1, call.columns});
        call.tokens = key.size(2);
        value.expect({call.rows, call.heads, call.tokens, call.columns});
        pastKey.expect({call.rows, call.heads, -1, call.columns});
        call.past = pastKey.size(2);
        pastValue.expect({call.rows, call.heads, call.past, call.columns});
        bias.expect({call.rows, 1, 1, -1, int64_t{call.past} + call.tokens});
        call.biasTokens = bias.size(3);
        if (call.biasTokens != 1 && call.biasTokens != call.tokens) {
            bias.expect({call.rows, 1, 1, call.tokens, int64_t{call.past} + call.tokens});
        }
        if (call.tokens == 0 ? q.size(2) != 0 : q.size(2) % call.tokens != 0) {
            throw std::runtime_error("q has " + std::to_string(q.size(2)) + " queries of a head, no multiple of the "
                + std::to_string(call.tokens) + " tokens.");
        }
        call.share = call.tokens ? q.size(2) / call.tokens : 0;
        call.q = q.data<void>();
        call.key = key.data<void>();
        call.value = value.data<void>();
        call.pastKey = pastKey.data<void>();
        call.pastValue = pastValue.data<void>();
        call.bias = bias.data<float>();
        call.mixed = output<void>(context, 0, {call.rows, call.heads, int64_t{call.share} * call.tokens, call.columns});
        if (int64_t{call.rows} * call.heads * call.share * call.tokens * call.columns == 0) {
            return; // no tensor has an address then
        }
        cpu::runAttention(call, onThreads, context);
    }

    ONNXTensorElementDataType mValues;
};

struct Op : SessionOp<Op, Kernel> {
    Op(DmoeSession* session, ONNXTensorElementDataType values) : SessionOp(session), values(values) {}

    char const* GetName() const { return "DmoeAttention"; }
    size_t GetInputTypeCount() const { return 6; }
    size_t GetOutputTypeCount() const { return 1; }
    ONNXTensorElementDataType GetInputType(size_t index) const
    {
        return index == 5 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT : values;
    }
    ONNXTensorElementDataType GetOutputType(size_t) const { return values; }

    Kernel* makeKernel(OrtKernelInfo const*) const { return new Kernel(values); }

    ONNXTensorElementDataType values;
};

} // namespace

void addAttention(Ort::CustomOpDomain& domain, DmoeSession* session)
{
    domain.Add(new Op(session, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT));
    domain.Add(new Op(session, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16));
}

} // namespace dmoe
