// dmoe::DmoeExperts on dmoe_experts(), once for fp16 and once for bf16.
#include "common.h"

namespace dmoe {
namespace {

constexpr char kName[] = "DmoeExperts";
constexpr int64_t kAlignment = 256; // of dmoe_experts' workspace

// Scratch memory of one call, given back when the launches are queued. On CUDA it belongs to the run's stream, so
// whoever gets it next comes after our kernels; see README.md.
class Workspace {
public:
    Workspace(OrtKernelContext* context, OrtAllocator* allocator, int64_t bytes) : mAllocator(allocator)
    {
        auto const size = static_cast<size_t>(bytes + kAlignment);
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

    void* data() const
    {
        auto const address = reinterpret_cast<uintptr_t>(mMemory);
        return reinterpret_cast<void*>((address + kAlignment - 1) / kAlignment * kAlignment);
    }

private:
    OrtAllocator* mAllocator;
    void* mMemory = nullptr;
};

class Kernel {
public:
    Kernel(OrtKernelInfo const* info, int32_t type) : mType(type)
    {
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
        down.expect({-1, shape.hidden, -1});
        shape.experts = down.size(0);
        shape.width = down.size(2);
        gateUp.expect({shape.experts, 2 * int64_t{shape.width}, shape.hidden});

        int64_t const bytes = dmoe_experts_workspace_bytes(&shape);
        check(bytes < 0 ? bytes : 0);
        auto* const mixed = output<void>(context, 0, {shape.tokens, shape.hidden});
        if (shape.tokens == 0) {
            return; // no tensor has an address then
        }
        Workspace const workspace(context, mAllocator, bytes);
        check(dmoe_experts(&shape, hidden.data<void>(), ids.data<int32_t>(), weights.data<float>(), gateUp.data<void>(),
            down.data<void>(), mixed, workspace.data(), stream(context)));
    }

    int32_t mType;
    OrtAllocator* mAllocator = nullptr;
};

struct Op : Ort::CustomOpBase<Op, Kernel, true> {
    explicit Op(int32_t type) : type(type) {}

    char const* GetName() const { return kName; }
    char const* GetExecutionProviderType() const { return kProvider; }
    size_t GetInputTypeCount() const { return 5; }
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
        default: return half();
        }
    }

    ONNXTensorElementDataType GetOutputType(size_t) const { return half(); }

    OrtStatus* CreateKernelV2(OrtApi const&, OrtKernelInfo const* info, void** kernel) const noexcept
    {
        return guarded(kName, [&] { *kernel = new Kernel(info, type); });
    }

    int32_t type; // DMOE_TYPE_*
};

} // namespace

void addExperts(Ort::CustomOpDomain& domain)
{
    static Op const fp16(DMOE_TYPE_FP16), bf16(DMOE_TYPE_BF16);
    domain.Add(&fp16);
    domain.Add(&bf16);
}

} // namespace dmoe
