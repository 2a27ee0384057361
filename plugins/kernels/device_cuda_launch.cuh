// The CUDA side of device.cuh: what the host asks about a device, and launches.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

namespace dmoe {

// Per device, asked once: the attribute queries are cheap but not free, and one sits in every layer of a model.
constexpr int kDevices = 64;

inline int device_attribute(cudaDeviceAttr attribute, std::atomic<int> (&known)[kDevices]) {
    int device = 0, value = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return 0;
    if (device < kDevices && (value = known[device].load(std::memory_order_relaxed))) return value;
    if (cudaDeviceGetAttribute(&value, attribute, device) != cudaSuccess) return 0;
    if (device < kDevices) known[device].store(value, std::memory_order_relaxed);
    return value;
}

inline bool bf16_runs_here() {
    static std::atomic<int> known[kDevices];
    return device_attribute(cudaDevAttrComputeCapabilityMajor, known) >= 8;
}

// 0, or CUDA's error where there is no device to ask.
inline int device_error() {
    int device = 0;
    return static_cast<int>(cudaGetDevice(&device));
}

// Bytes of shared memory, static and dynamic together, that a thread block can have, and that a processor has for all its
// blocks (1 KiB of it goes to the system with each block).
inline int shared_bytes_per_block() {
    static std::atomic<int> known[kDevices];
    return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, known);
}
inline int shared_bytes_per_processor() {
    static std::atomic<int> known[kDevices];
    return device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, known);
}

struct LaunchOptions {
    int shared = 0;        // bytes of dynamic shared memory
    bool overlap = false;  // may start before its predecessor has ended; the kernel calls wait_for_predecessor()
};

// Lets the kernel have so much dynamic shared memory on the current device, once, and asks the driver to give shared
// memory all that it shares with L1. The static 48 KiB need no permission.
template <auto Kernel>
cudaError_t allow_shared(int bytes) {
    static std::atomic<int> allowed[kDevices];
    int device = 0;
    if (bytes <= 49152) return cudaSuccess;
    if (const cudaError_t error = cudaGetDevice(&device)) return error;
    if (device < kDevices && allowed[device].load(std::memory_order_relaxed) >= bytes) return cudaSuccess;
    cudaError_t error = cudaFuncSetAttribute(Kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error == cudaSuccess) {
        error = cudaFuncSetAttribute(Kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
    }
    if (error == cudaSuccess && device < kDevices) allowed[device].store(bytes, std::memory_order_relaxed);
    return error;
}

// Whether the code that runs here has the instructions of programmatic dependent launch: cubins from 9.0 on have, PTX of
// 8.0 that the driver compiles for a newer device has not.
template <auto Kernel>
bool overlaps_here() {
    static std::atomic<int> known[kDevices];
    int device = 0, version = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return false;
    if (device < kDevices && (version = known[device].load(std::memory_order_relaxed))) return version >= 90;
    cudaFuncAttributes attributes;
    if (cudaFuncGetAttributes(&attributes, Kernel) != cudaSuccess) return false;
    if (device < kDevices) known[device].store(attributes.ptxVersion, std::memory_order_relaxed);
    return attributes.ptxVersion >= 90;
}

// How many blocks of the kernel the current device holds at once: the grid of a persistent kernel. 0: no such kernel.
template <auto Kernel>
int resident_blocks(int threads, int shared = 0) {
    static std::atomic<int> processors_known[kDevices];
    static std::atomic<int64_t> known[kDevices];  // bytes of shared memory, then blocks per processor
    int device = 0, per_processor = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return 0;
    const int64_t before = device < kDevices ? known[device].load(std::memory_order_relaxed) : 0;
    if (before && before >> 32 == shared) {
        per_processor = static_cast<int>(before & 0xffff);
    } else if (allow_shared<Kernel>(shared) != cudaSuccess ||
               cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, Kernel, threads, shared) != cudaSuccess) {
        return 0;
    } else if (device < kDevices && per_processor > 0) {
        known[device].store(static_cast<int64_t>(shared) << 32 | per_processor, std::memory_order_relaxed);
    }
    return per_processor * device_attribute(cudaDevAttrMultiProcessorCount, processors_known);
}

// 0 or the launch's cudaError_t. No dynamic shared memory, no overlap.
template <class Arguments>
int launch(void (*kernel)(Arguments), dim3 grid, int threads, void *stream, Arguments arguments) {
    void *pointers[] = {&arguments};
    return static_cast<int>(cudaLaunchKernel(reinterpret_cast<const void *>(kernel), grid, dim3(threads), pointers, 0,
                                             static_cast<cudaStream_t>(stream)));
}

// The same for a kernel known at compile time, with options.
template <auto Kernel, class Arguments>
int launch(dim3 grid, int threads, void *stream, const Arguments &arguments, LaunchOptions options) {
    if (const cudaError_t error = allow_shared<Kernel>(options.shared)) return static_cast<int>(error);
    cudaLaunchConfig_t config{};
    cudaLaunchAttribute overlap{};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    config.gridDim = grid, config.blockDim = dim3(threads), config.dynamicSmemBytes = options.shared;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &overlap, config.numAttrs = options.overlap && overlaps_here<Kernel>() ? 1 : 0;
    return static_cast<int>(cudaLaunchKernelEx(&config, Kernel, arguments));
}

inline const char *machine_error_string(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

}  // namespace dmoe
