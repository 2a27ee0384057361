// Memory that an op needs while it runs.
#pragma once

#include "common.h"
#include "workspace.h"

namespace dmoe {

// Where a node's scratch memory comes from; one per kernel.
class Scratch {
public:
    explicit Scratch(OrtKernelInfo const* info)
    {
        Ort::ThrowOnError(Ort::GetApi().KernelInfoGetAllocator(info, OrtMemTypeDefault, &mAllocator));
    }
    ~Scratch() { Ort::GetApi().ReleaseAllocator(mAllocator); }
    Scratch(Scratch const&) = delete;
    Scratch& operator=(Scratch const&) = delete;

    OrtAllocator* allocator() const { return mAllocator; }

private:
    OrtAllocator* mAllocator = nullptr;
};

// Scratch memory of one call, given back when the launches are queued. On CUDA it belongs to the run's stream, so
// whoever gets it next comes after our kernels; see README.md.
class Workspace {
public:
    Workspace(OrtKernelContext* context, Scratch const& scratch, int64_t bytes) : mAllocator(scratch.allocator())
    {
        auto const size = roomForWorkspace(bytes);
#ifdef DMOE_ONNXRUNTIME_CPU
        static_cast<void>(context);
        mMemory = mAllocator->Alloc(mAllocator, size);
#else
        OrtMemoryInfo const* place = nullptr;
        Ort::ThrowOnError(Ort::GetApi().AllocatorGetInfo(mAllocator, &place));
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

} // namespace dmoe
