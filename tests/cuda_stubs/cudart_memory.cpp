// libcudart without a device, its memory: the host's, aligned and zeroed; copies are copies.
#include "cudart_state.h"

#include <cstdlib>
#include <cstring>

namespace {

cudaError_t give(void** out, size_t size, cudaMemoryType type)
{
    Lock lock(state().mutex);
    char* const memory = static_cast<char*>(std::aligned_alloc(256, (size + 255) / 256 * 256 + 256));
    if (memory == nullptr) {
        return failed(cudaErrorMemoryAllocation);
    }
    std::memset(memory, 0, size);
    state().blocks[memory] = {size, type};
    *out = memory;
    return cudaSuccess;
}

cudaError_t take(void* memory)
{
    Lock lock(state().mutex);
    if (memory != nullptr && state().blocks.erase(static_cast<char*>(memory)) == 0) {
        state().violations.push_back("freed what was never allocated");
        return failed(cudaErrorInvalidValue);
    }
    std::free(memory);
    return cudaSuccess;
}

cudaMemoryType typeOf(void const* address)
{
    Lock lock(state().mutex);
    auto after = state().blocks.upper_bound(const_cast<char*>(static_cast<char const*>(address)));
    if (after == state().blocks.begin()) {
        return cudaMemoryTypeUnregistered;
    }
    auto const& [start, block] = *--after;
    return static_cast<char const*>(address) < start + block.first ? block.second : cudaMemoryTypeUnregistered;
}

} // namespace

STUB cudaError_t cudaMalloc(void** out, size_t size)
{
    auto const code = unsafe("cudaMalloc");
    return code ? code : give(out, size, cudaMemoryTypeDevice);
}
STUB cudaError_t cudaMallocHost(void** out, size_t size)
{
    auto const code = unsafe("cudaMallocHost");
    return code ? code : give(out, size, cudaMemoryTypeHost);
}
STUB cudaError_t cudaHostAlloc(void** out, size_t size, unsigned)
{
    auto const code = unsafe("cudaHostAlloc");
    return code ? code : give(out, size, cudaMemoryTypeHost);
}
STUB cudaError_t cudaFree(void* memory)
{
    auto const code = unsafe("cudaFree");
    return code ? code : take(memory);
}
STUB cudaError_t cudaFreeHost(void* memory)
{
    auto const code = unsafe("cudaFreeHost");
    return code ? code : take(memory);
}
STUB cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, void const* address)
{
    *attributes = {};
    attributes->type = typeOf(address);
    attributes->devicePointer = attributes->hostPointer = const_cast<void*>(address);
    return cudaSuccess;
}
STUB cudaError_t cudaMemcpyAsync(void* to, void const* source, size_t size, cudaMemcpyKind, cudaStream_t stream)
{
    dmoe_stub_call("cudaMemcpyAsync");
    stubWork(stream, kCopy, "cudaMemcpyAsync", [=] { std::memmove(to, source, size); }, source);
    return cudaSuccess;
}
STUB cudaError_t cudaMemcpy(void* to, void const* source, size_t size, cudaMemcpyKind)
{
    auto const code = unsafe("cudaMemcpy");
    if (code == cudaSuccess) {
        stubWork(nullptr, kCopy, "cudaMemcpy", [=] { std::memmove(to, source, size); }, source);
    }
    return code;
}
STUB cudaError_t cudaMemcpy2DAsync(void* to, size_t toPitch, void const* source, size_t sourcePitch, size_t width,
    size_t height, cudaMemcpyKind, cudaStream_t stream)
{
    dmoe_stub_call("cudaMemcpy2DAsync");
    stubWork(stream, kCopy, "cudaMemcpy2DAsync", [=] {
        for (size_t row = 0; row < height; ++row) {
            std::memmove(static_cast<char*>(to) + row * toPitch, static_cast<char const*>(source) + row * sourcePitch,
                width);
        }
    }, source);
    return cudaSuccess;
}
STUB cudaError_t cudaMemcpy3DAsync(cudaMemcpy3DParms const* p, cudaStream_t stream)
{
    dmoe_stub_call("cudaMemcpy3DAsync");
    stubWork(stream, kCopy, "cudaMemcpy3DAsync", [region = *p] {
        auto const row = [](cudaPitchedPtr const& side, size_t layer, size_t index) {
            return static_cast<char*>(side.ptr) + (layer * side.ysize + index) * side.pitch;
        };
        for (size_t layer = 0; layer < region.extent.depth; ++layer) {
            for (size_t index = 0; index < region.extent.height; ++index) {
                std::memmove(row(region.dstPtr, layer, index), row(region.srcPtr, layer, index), region.extent.width);
            }
        }
    }, p->srcPtr.ptr);
    return cudaSuccess;
}
STUB cudaError_t cudaMemsetAsync(void* to, int value, size_t size, cudaStream_t stream)
{
    dmoe_stub_call("cudaMemsetAsync");
    stubWork(stream, kSet, "cudaMemsetAsync", [=] { std::memset(to, value, size); });
    return cudaSuccess;
}
STUB cudaError_t cudaMemset(void* to, int value, size_t size)
{
    auto const code = unsafe("cudaMemset");
    if (code == cudaSuccess) {
        stubWork(nullptr, kSet, "cudaMemset", [=] { std::memset(to, value, size); });
    }
    return code;
}
