// dmoe::DmoeExperts and dmoe::DmoeMixture on dmoe_mixture(), for fp16 and bf16, each with weights of that type and of uint8.
#include "activation.h"
#include "scratch.h"

namespace dmoe {
namespace {

// Which of the ops, and for which weights.
struct Form {
    char const* name;
    int32_t type;   // DMOE_TYPE_* of the hidden state
    bool quantised; // weights are uint8, and the node says of how many bits and in which groups
    bool shared;    // the shared expert's weights are the last two inputs
};

class Kernel {
public:
    Kernel(OrtKernelInfo const* info, Form const& form, DmoeSession const* session)
        : mForm(form), mScratch(info), mActivation(activationOf(info))
    {
        if (form.quantised) {
            Ort::ConstKernelInfo const attributes(info);
            mBits = attributes.GetAttribute<int64_t>("bits");
            mGroupSize = attributes.GetAttribute<int64_t>("group_size");
            if ((mBits != 4 && mBits != 8) || (mGroupSize != 32 && mGroupSize != 64 && mGroupSize != 128)) {
                throw std::runtime_error("weights of " + std::to_string(mBits) + " bits in groups of "
                    + std::to_string(mGroupSize) + ", where 4 or 8 bits in groups of 32, 64 or 128 are needed.");
            }
            requireExpertsLayout(session);
        }
    }

    OrtStatus* ComputeV2(OrtKernelContext* context) const noexcept
    {
        return guarded(mForm.name, [&] { compute(context); });
    }

private:
    void compute(OrtKernelContext* context) const
    {
        Input const hidden(context, 0, "hidden"), ids(context, 1, "expert_ids"), weights(context, 2, "expert_weights");
        Input const gateUp(context, 3, "gate_up"), down(context, 4, "down");
        hidden.expect({-1, -1});
        DmoeExpertsShape shape{};
        shape.tokens = hidden.size(0);
        shape.hidden = hidden.size(1);
        shape.type = mForm.type;
        shape.activation = mActivation;
        ids.expect({shape.tokens, -1});
        shape.places = ids.size(1);
        weights.expect({shape.tokens, shape.places});
        int64_t const perElement = 8 / mBits;
        down.expect({-1, shape.hidden, -1});
        shape.experts = down.size(0);
        shape.width = static_cast<int32_t>(down.size(2) * perElement);
        gateUp.expect({shape.experts, 2 * int64_t{shape.width}, shape.hidden / perElement});
        DmoeQuantisation quantisation{};
        if (mForm.quantised) {
            Input const gateUpScales(context, 5, "gate_up_scales"), downScales(context, 6, "down_scales");
            gateUpScales.expect({shape.experts, 2 * int64_t{shape.width}, shape.hidden / mGroupSize});
            downScales.expect({shape.experts, shape.hidden, shape.width / mGroupSize});
            quantisation = {static_cast<int32_t>(mBits), static_cast<int32_t>(mGroupSize), gateUpScales.data<void>(),
                downScales.data<void>(), nullptr, nullptr};
        }

        DmoeSharedExpert shared{};
        if (mForm.shared) {
            size_t const at = mForm.quantised ? 7 : 5;
            Input const sharedGateUp(context, at, "shared_gate_up"), sharedDown(context, at + 1, "shared_down");
            sharedDown.expect({shape.hidden, -1});
            shared = {sharedDown.size(1), sharedGateUp.data<void>(), sharedDown.data<void>()};
            sharedGateUp.expect({2 * int64_t{shared.width}, shape.hidden});
        }
        auto const* const sharedExpert = mForm.shared ? &shared : nullptr;

        int64_t const bytes = dmoe_mixture_workspace_bytes(&shape, sharedExpert);
        check(bytes < 0 ? bytes : 0);
        auto* const mixed = output<void>(context, 0, {shape.tokens, shape.hidden});
        if (shape.tokens == 0) {
            return; // no tensor has an address then
        }
        Workspace const workspace(context, mScratch, bytes);
        check(dmoe_mixture(&shape, sharedExpert, mForm.quantised ? &quantisation : nullptr, nullptr, hidden.data<void>(),
            ids.data<int32_t>(), weights.data<float>(), gateUp.data<void>(), down.data<void>(), mixed, workspace.data(),
            stream(context)));
    }

    Form mForm;
    Scratch mScratch;
    int32_t mActivation; // DMOE_ACTIVATION_*
    int64_t mBits = 8, mGroupSize = 0; // so that a plain weight is one element
};

struct Op : SessionOp<Op, Kernel> {
    Op(DmoeSession* session, Form const& form) : SessionOp(session), form(form) {}

    char const* GetName() const { return form.name; }
    size_t GetInputTypeCount() const { return form.shared ? 9 : 7; }
    size_t GetOutputTypeCount() const { return 1; }

    ONNXTensorElementDataType half() const
    {
        return form.type == DMOE_TYPE_BF16 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
    }

    ONNXTensorElementDataType GetInputType(size_t index) const
    {
        switch (index) {
        case 1: return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
        case 2: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
        case 3:
        case 4: return form.quantised ? ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 : half();
        default: return half();
        }
    }

    ONNXTensorElementDataType GetOutputType(size_t) const { return half(); }

    // ONNX Runtime wants one list of inputs for all ops of a name: the scales are there with uint8 only, so the last two
    // may be missing.
    OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(size_t index) const
    {
        return index + 2 >= GetInputTypeCount() ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
    }

    Kernel* makeKernel(OrtKernelInfo const* info) const { return new Kernel(info, form, session()); }

    Form form;
};

void addForms(Ort::CustomOpDomain& domain, DmoeSession* session, char const* name, bool shared)
{
    for (int32_t const type : {DMOE_TYPE_FP16, DMOE_TYPE_BF16}) {
        domain.Add(new Op(session, Form{name, type, false, shared}));
        domain.Add(new Op(session, Form{name, type, true, shared}));
    }
}

} // namespace

void addExperts(Ort::CustomOpDomain& domain, DmoeSession* session) { addForms(domain, session, "DmoeExperts", false); }

void addMixture(Ort::CustomOpDomain& domain, DmoeSession* session) { addForms(domain, session, "DmoeMixture", true); }

bool const kAsksSource = false; // the kernels run after the op has returned
int32_t const kExpertsLayout = 2;

void addOps(Ort::CustomOpDomain& domain, DmoeSession* session)
{
    addAddNorm(domain, session);
    addBlockRoute(domain, session);
    addExperts(domain, session);
    addHead(domain, session);
    addMixture(domain, session);
    addRouter(domain, session);
    addSelfAttention(domain, session);
}

} // namespace dmoe
