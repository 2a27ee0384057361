// dmoe::DmoeLinear for ONNX Runtime's CPU provider: Gemm(x, w, b) with transB = 1, in float32 or float16.
#include "op.h"

#include "linear.h"

namespace dmoe {
namespace {

constexpr char kName[] = "DmoeLinear";
constexpr size_t kBias = 2;

class Kernel {
public:
    explicit Kernel(cpu::Format format) : mFormat(format) {}

    OrtStatus* ComputeV2(OrtKernelContext* context) noexcept
    {
        return guarded(kName, [&] { compute(context); });
    }

private:
    void compute(OrtKernelContext* context)
    {
        Input const x(context, 0, "x"), weight(context, 1, "w");
        x.expect({-1, -1});
        weight.expect({-1, x.size(1)});
        cpu::Linear call{};
        call.format = mFormat;
        call.tokens = x.size(0);
        call.columns = x.size(1);
        call.rows = weight.size(0);
        call.x = x.data<void>();
        call.weight = weight.data<void>();
        if (Ort::KernelContext(context).GetInputCount() > kBias) {
            Input const bias(context, kBias, "b");
            bias.expect({call.rows});
            call.bias = bias.data<void>();
        }
        call.y = output<void>(context, 0, {call.tokens, call.rows});
        if (int64_t{call.tokens} * call.rows == 0) {
            return; // no tensor has an address then
        }
        cpu::runLinear(call, onThreads, context, mLost);
        if (mLost) {
            throw std::runtime_error("the file of the weights was cut short while it was read.");
        }
    }

    cpu::Format mFormat;
    std::atomic<bool> mLost{false}; // for good: pages that were lost read as zeros now
};

struct Op : SessionOp<Op, Kernel> {
    Op(DmoeSession* session, bool half) : SessionOp(session), half(half) {}

    char const* GetName() const { return kName; }
    size_t GetInputTypeCount() const { return kBias + 1; }
    size_t GetOutputTypeCount() const { return 1; }
    ONNXTensorElementDataType GetInputType(size_t) const { return type(); }
    ONNXTensorElementDataType GetOutputType(size_t) const { return type(); }

    OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(size_t index) const
    {
        return index < kBias ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
    }

    Kernel* makeKernel(OrtKernelInfo const*) const { return new Kernel(half ? cpu::Format::kHalf : cpu::Format::kFloat); }

    ONNXTensorElementDataType type() const
    {
        return half ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    }

    bool half;
};

} // namespace

void addLinear(Ort::CustomOpDomain& domain, DmoeSession* session)
{
    domain.Add(new Op(session, false));
    domain.Add(new Op(session, true));
}

} // namespace dmoe
