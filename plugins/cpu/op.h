// What the CPU's custom ops share, on top of the adapters of both libraries.
#pragma once

#include "../onnxruntime/common.h"

namespace dmoe {

// On the threads of the session. They run no exception handlers of ours: the work does not throw.
inline void onThreads(void* context, size_t count, void (*work)(void*, size_t), void* argument)
{
    Ort::KernelContext(static_cast<OrtKernelContext*>(context)).ParallelFor(work, count, 0, argument);
}

} // namespace dmoe
