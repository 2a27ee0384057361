// libcudart without a device, its streams, events and graphs: recording follows CUDA's rules.
#include "cudart_state.h"

namespace {

struct Graph {
    std::vector<Node> nodes;
};

cudaError_t waits(char const* name, void* stream)
{
    Lock lock(state().mutex);
    dmoe_stub_call(name);
    auto& that = state().streams[stream];
    if (that.recording) {
        that.broken = true;
        state().violations.push_back(std::string(name) + " waits for a stream that is recorded");
        return failed(cudaErrorStreamCaptureUnsupported);
    }
    return cudaSuccess;
}

} // namespace

// Streams and events. All work is done when it is enqueued, so events need no state.

STUB cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned)
{
    dmoe_stub_call("cudaStreamCreate");
    *stream = reinterpret_cast<cudaStream_t>(new char);
    return cudaSuccess;
}
STUB cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithFlags(stream, 0); }
STUB cudaError_t cudaStreamDestroy(cudaStream_t stream)
{
    Lock lock(state().mutex);
    state().streams.erase(stream);
    delete reinterpret_cast<char*>(stream);
    return cudaSuccess;
}
STUB cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return waits("cudaStreamSynchronize", stream); }
STUB cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned)
{
    dmoe_stub_call("cudaStreamWaitEvent");
    return cudaSuccess;
}
STUB cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned)
{
    *event = reinterpret_cast<cudaEvent_t>(new char);
    return cudaSuccess;
}
STUB cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
STUB cudaError_t cudaEventDestroy(cudaEvent_t event)
{
    delete reinterpret_cast<char*>(event);
    return cudaSuccess;
}
STUB cudaError_t cudaEventQuery(cudaEvent_t) { return cudaSuccess; }
STUB cudaError_t cudaEventSynchronize(cudaEvent_t) { return unsafe("cudaEventSynchronize"); }
STUB cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t)
{
    *milliseconds = 1;
    return cudaSuccess;
}

// Recording and graphs.

STUB cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode)
{
    Lock lock(state().mutex);
    dmoe_stub_call("cudaStreamBeginCapture");
    auto& stream = state().streams[handle];
    stream = {};
    stream.recording = true;
    stream.mode = mode;
    stream.thread = std::this_thread::get_id();
    return cudaSuccess;
}
STUB cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status)
{
    Lock lock(state().mutex);
    auto const& stream = state().streams[handle];
    *status = !stream.recording ? cudaStreamCaptureStatusNone
        : stream.broken         ? cudaStreamCaptureStatusInvalidated
                                : cudaStreamCaptureStatusActive;
    return cudaSuccess;
}
STUB cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph)
{
    Lock lock(state().mutex);
    dmoe_stub_call("cudaStreamEndCapture");
    auto& stream = state().streams[handle];
    stream.recording = false;
    *graph = nullptr;
    if (stream.broken) {
        return failed(cudaErrorStreamCaptureInvalidated);
    }
    *graph = reinterpret_cast<cudaGraph_t>(new Graph{std::move(stream.nodes)});
    return cudaSuccess;
}
STUB cudaError_t cudaGraphInstantiate(cudaGraphExec_t* made, cudaGraph_t graph, unsigned long long)
{
    dmoe_stub_call("cudaGraphInstantiate");
    *made = reinterpret_cast<cudaGraphExec_t>(new Graph(*reinterpret_cast<Graph*>(graph)));
    return cudaSuccess;
}
STUB cudaError_t cudaGraphDestroy(cudaGraph_t graph)
{
    delete reinterpret_cast<Graph*>(graph);
    return cudaSuccess;
}
STUB cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph)
{
    delete reinterpret_cast<Graph*>(graph);
    return cudaSuccess;
}
STUB cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream)
{
    dmoe_stub_call("cudaGraphLaunch");
    for (Node const& node : reinterpret_cast<Graph*>(graph)->nodes) {
        stubWork(stream, node.kind, node.name.c_str(), node.work, node.source);
    }
    return cudaSuccess;
}
// Nodes are the graph's own memory: they live as long as it does.
STUB cudaError_t cudaGraphGetNodes(cudaGraph_t handle, cudaGraphNode_t* nodes, size_t* count)
{
    auto& all = reinterpret_cast<Graph*>(handle)->nodes;
    for (size_t i = 0; nodes != nullptr && i < *count; ++i) {
        nodes[i] = i < all.size() ? reinterpret_cast<cudaGraphNode_t>(&all[i]) : nullptr;
    }
    *count = nodes == nullptr || all.size() < *count ? all.size() : *count;
    return cudaSuccess;
}
STUB cudaError_t cudaGraphNodeGetType(cudaGraphNode_t node, cudaGraphNodeType* type)
{
    cudaGraphNodeType const types[] = {cudaGraphNodeTypeKernel, cudaGraphNodeTypeMemcpy, cudaGraphNodeTypeMemset,
        cudaGraphNodeTypeKernel, cudaGraphNodeTypeHost};
    *type = types[reinterpret_cast<Node*>(node)->kind];
    return cudaSuccess;
}
STUB cudaError_t cudaGraphMemcpyNodeGetParams(cudaGraphNode_t node, cudaMemcpy3DParms* parameters)
{
    *parameters = {};
    parameters->srcPtr.ptr = const_cast<void*>(reinterpret_cast<Node*>(node)->source);
    return cudaSuccess;
}
