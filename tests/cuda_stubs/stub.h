// What the stub libraries share: every call is counted, work on a stream is either done at once or recorded.
#pragma once
#include <cstddef>
#include <functional>

#define STUB extern "C" __attribute__((visibility("default")))

enum StubKind { kKernel, kCopy, kSet, kLibrary, kHost };

// Counts a call by its name.
STUB void dmoe_stub_call(char const* name);
// Work on a stream: an operation of the device. `source`: what a copy reads, null for other work.
void stubWork(void* stream, StubKind kind, char const* name, std::function<void()> work, void const* source = nullptr);
// The same for the libraries, whose work has no effect here.
STUB void dmoe_stub_library(void* stream, char const* name);
