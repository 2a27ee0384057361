// dmoe::DmoeExperts on dmoe_experts() and dmoe_experts_quantised(), for fp16 and bf16, each with weights of that type and
// of uint8.
#include "common.h"
#include "workspace.h"

namespace dmoe {
namespace {

constexpr char kName[] = "DmoeExperts";

// Scratch memory of one call, given back when the launches are queued. On CUDA it belongs to the run's stream, so
// whoever gets it next comes after our kernels; see README.md.
class Workspace {
public:
    Workspace(OrtKernelContext* context, OrtAllocator* allocator, int64_t bytes) : mAllocator(allocator)
    {
        auto const size = roomForWorkspace(bytes);
#ifdef DMOE_ONNXRUNTIME_CPU
        static_cast<void>(context);
        mMemory = allocator->Alloc(allocator, size);
#else
        OrtMemoryInfo const* place = nullptr;
        Ort::ThrowOnError(Ort::GetApi().AllocatorGetInfo(allocator, &place));
        Ort::ThrowOnError(Ort::GetApi().KernelContext_GetScratchBuffer(context, place, size, &mMemory));
#endif
        if (mMemory == nullptr) {
            throw std::runtime_error("no " + std::to_string(size) + " bytes of scratch memory are left.");
        }
    }
    ~Workspace() { mAllocator->Free(mAllocator, mMemory); }
    Workspace(Workspace const&) = delete;
    Workspace& operator=(Workspace const&) = delete;

    void* data() const { return alignedWorkspace(mMemory); }

private:
    OrtAllocator* mAllocator;
    void* mMemory = nullptr;
};

class Kernel {
public:
    // `quantised`: the weights are uint8, and the node says of how many bits and in which groups.
    Kernel(OrtKernelInfo const* info, int32_t type, bool quantised) : mType(type), mQuantised(quantised)
    {
        if (quantised) {
            Ort::ConstKernelInfo const attributes(info);
            mBits = attributes.GetAttribute<int64_t>("bits");
            mGroupSize = attributes.GetAttribute<int64_t>("group_size");
            if ((mBits != 4 && mBits != 8) || (mGroupSize != 32 && mGroupSize != 64 && mGroupSize != 128)) {
                throw std::runtime_error("weights of " + std::to_string(mBits) + " bits in groups of "
                    + std::to_string(mGroupSize) + ", where 4 or 8 bits in groups of 32, 64 or 128 are needed.");
            }
        }
        Ort::ThrowOnError(Ort::GetApi().KernelInfoGetAllocator(info, OrtMemTypeDefault, &mAllocator));
    }
    ~Kernel() { Ort::GetApi().ReleaseAllocator(mAllocator); }
    Kernel(Kernel const&) = delete;
    Kernel& operator=(Kernel const&) = delete;

    OrtStatus* ComputeV2(OrtKernelContext* context) const noexcept
    {
        return guarded(kName, [&] { compute(context); });
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
        shape.type = mType;
        ids.expect({shape.tokens, -1});
        shape.places = ids.size(1);
        weights.expect({shape.tokens, shape.places});
        int64_t const perElement = 8 / mBits;
        down.expect({-1, shape.hidden, -1});
        shape.experts = down.size(0);
        shape.width = static_cast<int32_t>(down.size(2) * perElement);
        gateUp.expect({shape.experts, 2 * int64_t{shape.width}, shape.hidden / perElement});
        DmoeQuantisation quantisation{};
        if (mQuantised) {
            Input const gateUpScales(context, 5, "gate_up_scales"), downScales(context, 6, "down_scales");
            gateUpScales.expect({shape.experts, 2 * int64_t{shape.width}, shape.hidden / mGroupSize});
            downScales.expect({shape.experts, shape.hidden, shape.width / mGroupSize});
            quantisation = {static_cast<int32_t>(mBits), static_cast<int32_t>(mGroupSize), gateUpScales.data<void>(),
                downScales.data<void>(), nullptr, nullptr};
        }

        int64_t const bytes = dmoe_experts_workspace_bytes(&shape);
        check(bytes < 0 ? bytes : 0);
        auto* const mixed = output<void>(context, 0, {shape.tokens, shape.hidden});
        if (shape.tokens == 0) {
            return; // no tensor has an address then
        }
        Workspace const workspace(context, mAllocator, bytes);
        check(dmoe_experts_quantised(&shape, mQuantised ? &quantisation : nullptr, nullptr, hidden.data<void>(),
            ids.data<int32_t>(), weights.data<float>(), gateUp.data<void>(), down.data<void>(), mixed, workspace.data(),
            stream(context)));
    }

    int32_t mType;
    bool mQuantised;
    int64_t mBits = 8, mGroupSize = 0; // so that a plain weight is one element
    OrtAllocator* mAllocator = nullptr;
};

struct Op : SessionOp<Op, Kernel> {
    Op(DmoeSession* session, int32_t type, bool quantised) : SessionOp(session), type(type), quantised(quantised) {}

    char const* GetName() const { return kName; }
    size_t GetInputTypeCount() const { return 7; }
    size_t GetOutputTypeCount() const { return 1; }

    ONNXTensorElementDataType half() const
    {
        return type == DMOE_TYPE_BF16 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
    }

    ONNXTensorElementDataType GetInputType(size_t index) const
    {
        switch (index) {
        case 1: return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
        case 2: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
        case 3:
        case 4: return quantised ? ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 : half();
        default: return half();
        }
    }

    ONNXTensorElementDataType GetOutputType(size_t) const { return half(); }

    // ONNX Runtime wants one list of inputs for all ops of a name: the scales are there with uint8 only.
    OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(size_t index) const
    {
        return index >= 5 ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
    }

    Kernel* makeKernel(OrtKernelInfo const* info) const { return new Kernel(info, type, quantised); }

    int32_t type; // DMOE_TYPE_*
    bool quantised;
};

} // namespace

void addExperts(Ort::CustomOpDomain& domain, DmoeSession* session)
{
    for (int32_t const type : {DMOE_TYPE_FP16, DMOE_TYPE_BF16}) {
        domain.Add(new Op(session, type, false));
        domain.Add(new Op(session, type, true));
    }
}

bool const kAsksSource = false; // the kernels run after the op has returned

void addOps(Ort::CustomOpDomain& domain, DmoeSession* session)
{
    addBlockRoute(domain, session);
    addExperts(domain, session);
}

} // namespace dmoe
