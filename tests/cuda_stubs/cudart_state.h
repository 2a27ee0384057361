// What cudart's stubs keep: counts, kernels by name, live memory, streams and what is recorded on them.
#pragma once
#include "stub.h"

#include <cuda_runtime_api.h>

#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

struct Node {
    StubKind kind;
    std::string name;
    std::function<void()> work;
    void const* source;
};

struct Stream {
    bool recording = false, broken = false;
    cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
    std::thread::id thread;
    std::vector<Node> nodes;
};

struct State {
    std::recursive_mutex mutex;
    std::map<std::string, long> counts; // "call:" calls of the host, "op:" operations by kind, "kernel:" launches by name
    std::vector<std::string> violations;
    std::map<char*, std::pair<size_t, cudaMemoryType>> blocks;
    std::map<void const*, std::string> kernels;
    std::map<void*, Stream> streams;
};

using Lock = std::lock_guard<std::recursive_mutex>;

State& state();

// What cudaGetLastError() says next on this thread.
extern thread_local cudaError_t tLast;
cudaError_t failed(cudaError_t code);

// Counts a call that CUDA forbids while this thread records, except in relaxed mode; the recording is lost then.
cudaError_t unsafe(char const* name);
