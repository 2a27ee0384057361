// dmoe::DmoeLinear for ONNX Runtime's CPU provider: Gemm(x, w, b) with transB = 1 and nothing else, in float32. Graphs do
// not have it: the runtime puts it in the place of such Gemms (dmoe_export/runtime/linear_layers.py).
#include "op.h"

#include "linear.h"

namespace dmoe {
namespace {

constexpr char kName[] = "DmoeLinear";
constexpr size_t kBias = 2;
constexpr auto kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;

class Kernel {
public:
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
        call.tokens = x.size(0);
        call.columns = x.size(1);
        call.rows = weight.size(0);
        call.x = x.data<float>();
        call.weight = weight.data<float>();
        if (Ort::KernelContext(context).GetInputCount() > kBias) {
            Input const bias(context, kBias, "b");
            bias.expect({call.rows});
            call.bias = bias.data<float>();
        }
        call.y = output<float>(context, 0, {call.tokens, call.rows});
        if (int64_t{call.tokens} * call.rows == 0) {
            return; // no tensor has an address then
        }
        cpu::runLinear(call, onThreads, context, mLost);
        if (mLost) {
            throw std::runtime_error("the file of the weights was cut short while it was read.");
        }
    }

    std::atomic<bool> mLost{false}; // for good: pages that were lost read as zeros now
};

struct Op : Ort::CustomOpBase<Op, Kernel, true> {
    char const* GetName() const { return kName; }
    char const* GetExecutionProviderType() const { return "CPUExecutionProvider"; }
    size_t GetInputTypeCount() const { return kBias + 1; }
    size_t GetOutputTypeCount() const { return 1; }
    ONNXTensorElementDataType GetInputType(size_t) const { return kFloat; }
    ONNXTensorElementDataType GetOutputType(size_t) const { return kFloat; }

    OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(size_t index) const
    {
        return index < kBias ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
    }

    OrtStatus* CreateKernelV2(OrtApi const&, OrtKernelInfo const*, void** kernel) const noexcept
    {
        return guarded(kName, [&] { *kernel = new Kernel; });
    }
};

} // namespace

void addLinear(Ort::CustomOpDomain& domain)
{
    static Op const op;
    domain.Add(&op);
}

} // namespace dmoe
