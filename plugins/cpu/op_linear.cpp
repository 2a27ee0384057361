// dmoe::DmoeLinear and dmoe::DmoeQuantisedLinear for ONNX Runtime's CPU provider: Gemm(x, w, b) with transB = 1.
#include "op.h"

#include "linear.h"

#include <initializer_list>

namespace dmoe {
namespace {

// Types of x, scales, b and y, and of w.
struct Kinds {
    ONNXTensorElementDataType values, weights;
};

class Kernel {
public:
    Kernel(OrtKernelInfo const* info, char const* name, Kinds kinds, DmoeSession const* session)
        : mName(name), mKinds(kinds), mSession(session)
    {
        if (quantised()) {
            Ort::ConstKernelInfo const facts(info);
            mBits = facts.GetAttribute<int64_t>("bits");
            mGroup = facts.GetAttribute<int64_t>("group_size");
            checkQuantisation(mBits, mGroup);
        }
    }

    OrtStatus* ComputeV2(OrtKernelContext* context) noexcept
    {
        return guarded(mName, [&] { compute(context); });
    }

private:
    bool quantised() const { return mKinds.weights == ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8; }

    void compute(OrtKernelContext* context)
    {
        Input const x(context, 0, "x"), weight(context, 1, "w");
        x.expect({-1, -1});
        cpu::Linear call{};
        call.values = weightFormat(mKinds.values, 0);
        call.weights = weightFormat(mKinds.weights, mBits);
        call.fast = fastProducts(mSession);
        call.tokens = x.size(0);
        call.columns = x.size(1);
        weight.expect({-1, cpu::rowBytes(call.weights, call.columns) / bytesOfValue()});
        call.rows = weight.size(0);
        call.x = x.data<void>();
        call.weight = weight.data<void>();
        size_t bias = 2;
        if (quantised()) {
            if (call.columns % mGroup != 0) {
                throw std::runtime_error("group_size " + std::to_string(mGroup) + " does not divide the columns "
                    + std::to_string(call.columns) + ".");
            }
            call.groupShift = __builtin_ctz(static_cast<unsigned>(mGroup));
            Input const scales(context, bias++, "scales");
            scales.expect({call.rows, call.columns / mGroup});
            call.scales = scales.data<void>();
        }
        if (Ort::KernelContext(context).GetInputCount() > bias) {
            Input const given(context, bias, "b");
            given.expect({call.rows});
            call.bias = given.data<void>();
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

    int64_t bytesOfValue() const
    {
        return quantised() ? 1 : mKinds.weights == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT ? 4 : 2;
    }

    char const* mName;
    Kinds mKinds;
    DmoeSession const* mSession; // may be null
    std::atomic<bool> mLost{false}; // for good: pages that were lost read as zeros now
    int64_t mBits = 0, mGroup = 0; // 0: the weights are not quantised
};

struct Op : SessionOp<Op, Kernel> {
    Op(DmoeSession* session, Kinds kinds) : SessionOp(session), kinds(kinds) {}

    bool quantised() const { return kinds.weights == ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8; }
    size_t bias() const { return quantised() ? 3 : 2; }
    char const* GetName() const { return quantised() ? "DmoeQuantisedLinear" : "DmoeLinear"; }
    size_t GetInputTypeCount() const { return bias() + 1; }
    size_t GetOutputTypeCount() const { return 1; }
    ONNXTensorElementDataType GetInputType(size_t index) const { return index == 1 ? kinds.weights : kinds.values; }
    ONNXTensorElementDataType GetOutputType(size_t) const { return kinds.values; }

    OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(size_t index) const
    {
        return index < bias() ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
    }

    Kernel* makeKernel(OrtKernelInfo const* info) const { return new Kernel(info, GetName(), kinds, session()); }

    Kinds kinds;
};

constexpr auto kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, kHalf = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16,
               kBFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16, kByte = ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;

void add(Ort::CustomOpDomain& domain, DmoeSession* session, std::initializer_list<Kinds> all)
{
    for (Kinds const kinds : all) {
        domain.Add(new Op(session, kinds));
    }
}

} // namespace

void addLinear(Ort::CustomOpDomain& domain, DmoeSession* session)
{
    add(domain, session, {{kFloat, kFloat}, {kFloat, kHalf}, {kFloat, kBFloat}, {kHalf, kHalf}});
    add(domain, session, {{kFloat, kByte}, {kHalf, kByte}});
}

} // namespace dmoe
