// dmoe::DmoeExperts for ONNX Runtime's CPU provider, on its threads.
#include "op.h"

#include "../onnxruntime/activation.h"
#include "experts.h"
#include "scratch.h"

namespace dmoe {
namespace {

constexpr char kName[] = "DmoeExperts";
constexpr size_t kScales = 5; // gate_up_scales, down_scales: of quantised experts only

struct Kinds {
    ONNXTensorElementDataType hidden, weights, scales;
};

class Kernel {
public:
    Kernel(OrtKernelInfo const* info, Kinds kinds, DmoeSession const* session)
        : mKinds(kinds), mSession(session), mActivation(activationOf(info))
    {
        if (kinds.weights == ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8) {
            Ort::ConstKernelInfo const facts(info);
            mBits = facts.GetAttribute<int64_t>("bits");
            mGroup = facts.GetAttribute<int64_t>("group_size");
            checkQuantisation(mBits, mGroup);
            requireExpertsLayout(session);
        }
    }

    OrtStatus* ComputeV2(OrtKernelContext* context) noexcept
    {
        return guarded(kName, [&] { compute(context); });
    }

private:
    void compute(OrtKernelContext* context)
    {
        Input const hidden(context, 0, "hidden"), ids(context, 1, "expert_ids"), weights(context, 2, "expert_weights");
        Input const gateUp(context, 3, "gate_up"), down(context, 4, "down");
        hidden.expect({-1, -1});
        ids.expect({hidden.size(0), -1});
        weights.expect({hidden.size(0), ids.size(1)});
        cpu::Experts call{};
        call.tokens = hidden.size(0);
        call.places = ids.size(1);
        call.hidden = hidden.size(1);
        call.ids = ids.data<int32_t>();
        call.weights = weights.data<float>();
        call.gateUp = gateUp.data<void>();
        call.down = down.data<void>();
        bool const half = mKinds.hidden == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
        call.format = weightFormat(mKinds.weights, mBits);
        call.fast = fastProducts(mSession);
        call.activation = mActivation;
        down.expect({-1, call.hidden, -1});
        call.experts = down.size(0);
        call.width = static_cast<int32_t>(mBits == 4 ? 2 * int64_t{down.size(2)} : down.size(2));
        int64_t const columns = mBits == 4 ? call.hidden / 2 : call.hidden;
        gateUp.expect({call.experts, 2 * int64_t{call.width}, columns});
        if (mBits) {
            auto const group = static_cast<int32_t>(mGroup);
            call.groupShift = __builtin_ctz(static_cast<unsigned>(group));
            if (call.hidden % group != 0 || call.width % group != 0) {
                throw std::runtime_error("group_size " + std::to_string(mGroup) + " does not divide the hidden size "
                    + std::to_string(call.hidden) + " and the width " + std::to_string(call.width) + ".");
            }
            Input const gateUpScales(context, kScales, "gate_up_scales"), downScales(context, kScales + 1,
                "down_scales");
            gateUpScales.expect({call.experts, 2 * int64_t{call.width}, call.hidden / group});
            downScales.expect({call.experts, call.hidden, call.width / group});
            call.gateUpScales = gateUpScales.data<void>();
            call.downScales = downScales.data<void>();
            call.halfScales = mKinds.scales == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
        }
        int64_t const values = int64_t{call.tokens} * call.hidden;
        void* const mixed = output<void>(context, 0, {call.tokens, call.hidden});
        if (values == 0) {
            return; // no tensor has an address then
        }
        struct Memory {
            std::vector<float> in, out;
        };
        auto& [in, out] = cpu::ofThread<Memory>();
        if (half) {
            in.resize(values);
            out.resize(values);
            cpu::instructionSet().fromHalf(hidden.data<uint16_t>(), values, in.data());
        }
        call.x = half ? in.data() : hidden.data<float>();
        call.mixed = half ? out.data() : static_cast<float*>(mixed);
        cpu::runExperts(call, mSession, onThreads, context, mLost);
        if (mLost) {
            throw std::runtime_error("the file of the experts was cut short while it was read.");
        }
        if (half) {
            cpu::instructionSet().toHalf(out.data(), values, static_cast<uint16_t*>(mixed));
        }
    }

    Kinds mKinds;
    DmoeSession const* mSession; // may be null
    int32_t mActivation; // DMOE_ACTIVATION_*
    std::atomic<bool> mLost{false}; // for good: pages that were lost read as zeros now
    int64_t mBits = 0, mGroup = 0; // 0: the weights are not quantised
};

struct Op : SessionOp<Op, Kernel> {
    Op(DmoeSession* session, Kinds kinds) : SessionOp(session), kinds(kinds) {}

    char const* GetName() const { return kName; }
    size_t GetInputTypeCount() const { return kScales + 2; }
    size_t GetOutputTypeCount() const { return 1; }

    OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(size_t index) const
    {
        return index < kScales ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
    }

    ONNXTensorElementDataType GetInputType(size_t index) const
    {
        switch (index) {
        case 0: return kinds.hidden;
        case 1: return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
        case 3:
        case 4: return kinds.weights;
        case kScales:
        case kScales + 1: return kinds.scales;
        default: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
        }
    }

    ONNXTensorElementDataType GetOutputType(size_t) const { return kinds.hidden; }

    Kernel* makeKernel(OrtKernelInfo const* info) const { return new Kernel(info, kinds, session()); }

    Kinds kinds;
};

} // namespace

void addExperts(Ort::CustomOpDomain& domain, DmoeSession* session)
{
    constexpr auto kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, kHalf = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16,
                   kBFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16, kByte = ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
    // Scales are of the dense parts' precision.
    for (Kinds const kinds : {Kinds{kFloat, kFloat, kFloat}, {kFloat, kHalf, kFloat}, {kFloat, kBFloat, kFloat},
             {kHalf, kHalf, kFloat}, {kFloat, kByte, kFloat}, {kHalf, kByte, kHalf}}) {
        domain.Add(new Op(session, kinds));
    }
}

bool const kAsksSource = true;
int32_t const kExpertsLayout = 1; // neighbours of a row are what these kernels multiply at once

// Routing has its ONNX body here.
void addOps(Ort::CustomOpDomain& domain, DmoeSession* session)
{
    addExperts(domain, session);
    addLinear(domain, session);
    addAttention(domain, session);
}

} // namespace dmoe
