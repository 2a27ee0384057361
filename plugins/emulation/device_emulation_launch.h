// The emulated side of kernels/device.cuh: what the host asks about a device, and launches.
#pragma once

#include "emulator.h"

namespace dmoe {

inline bool bf16_runs_here() { return true; }

inline int device_error() { return 0; }
inline int shared_bytes_per_block() { return emulation::device_shared_bytes(); }
inline int shared_bytes_per_processor() { return emulation::device_shared_bytes() + 1024; }

struct LaunchOptions {
    int shared = 0;
    bool overlap = false;  // launches never overlap here
};

// Few blocks, so that every one of them goes round its loop.
template <auto Kernel>
int resident_blocks(int, int = 0) {
    return 3;
}

template <class Arguments>
int launch(void (*kernel)(Arguments), dim3 grid, int threads, void *, Arguments arguments) {
    return emulation::run(grid, static_cast<unsigned>(threads), 0, [&] { kernel(arguments); });
}
template <auto Kernel, class Arguments>
int launch(dim3 grid, int threads, void *, const Arguments &arguments, LaunchOptions options) {
    return emulation::run(grid, static_cast<unsigned>(threads), static_cast<size_t>(options.shared),
                          [&] { Kernel(arguments); });
}

inline const char *machine_error_string(int) { return "unknown error code"; }

}  // namespace dmoe
