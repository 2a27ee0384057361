// Workspace of dmoe_experts() out of memory that others align: TensorRT and ONNX Runtime promise less than kernels need.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dmoe {

constexpr int64_t kWorkspaceAlignment = 256;

// What to ask for, so that alignedWorkspace() leaves `bytes`.
inline size_t roomForWorkspace(int64_t bytes)
{
    return static_cast<size_t>(bytes + kWorkspaceAlignment);
}

// The first aligned address in `memory`; null stays null.
inline void* alignedWorkspace(void* memory)
{
    auto const address = reinterpret_cast<uintptr_t>(memory) + kWorkspaceAlignment - 1;
    return reinterpret_cast<void*>(address / kWorkspaceAlignment * kWorkspaceAlignment);
}

} // namespace dmoe
