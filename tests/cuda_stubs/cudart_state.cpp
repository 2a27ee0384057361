// Counting and recording: work is done at once, or kept as a node of what a stream records.
#include "cudart_state.h"

namespace {

char const* const kNames[] = {"kernel", "copy", "set", "library", "host"};

} // namespace

thread_local cudaError_t tLast = cudaSuccess;

State& state()
{
    static State* const it = new State; // never destroyed: libraries unload late
    return *it;
}

cudaError_t failed(cudaError_t code)
{
    tLast = code;
    return code;
}

cudaError_t unsafe(char const* name)
{
    Lock lock(state().mutex);
    dmoe_stub_call(name);
    for (auto& [handle, stream] : state().streams) {
        bool const forbidden = stream.mode == cudaStreamCaptureModeGlobal
            || (stream.mode == cudaStreamCaptureModeThreadLocal && stream.thread == std::this_thread::get_id());
        if (stream.recording && forbidden) {
            stream.broken = true;
            state().violations.push_back(std::string(name) + " while a stream is recorded");
            return failed(cudaErrorStreamCaptureUnsupported);
        }
    }
    return cudaSuccess;
}

void stubWork(void* handle, StubKind kind, char const* name, std::function<void()> work, void const* source)
{
    Lock lock(state().mutex);
    auto& stream = state().streams[handle];
    if (stream.recording) {
        stream.nodes.push_back({kind, name, std::move(work), source});
        return;
    }
    for (auto const& [other, that] : state().streams) {
        if (that.recording && that.thread == std::this_thread::get_id()) {
            state().violations.push_back(std::string(name) + " on another stream than the one that is recorded");
        }
    }
    ++state().counts[std::string("op:") + kNames[kind]];
    ++state().counts[std::string(kNames[kind]) + ":" + name];
    work();
}

STUB void dmoe_stub_library(void* stream, char const* name)
{
    dmoe_stub_call(name);
    stubWork(stream, kLibrary, name, [] {});
}

STUB void dmoe_stub_call(char const* name)
{
    Lock lock(state().mutex);
    ++state().counts[std::string("call:") + name];
}

STUB void dmoe_stub_reset()
{
    Lock lock(state().mutex);
    state().counts.clear();
    state().violations.clear();
    tLast = cudaSuccess;
}

// Lines "count name", then lines "! violation"; valid until the next call.
STUB char const* dmoe_stub_report()
{
    Lock lock(state().mutex);
    static std::string text;
    text.clear();
    for (auto const& [name, count] : state().counts) {
        text += std::to_string(count) + " " + name + "\n";
    }
    for (auto const& what : state().violations) {
        text += "! " + what + "\n";
    }
    return text.c_str();
}
