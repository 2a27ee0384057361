// What of cuBLAS, cuBLASLt, cuDNN and the driver must do more than be counted; build.py generates the rest. Each library
// takes its part of this file (STUB_CUBLAS, STUB_CUBLASLT, STUB_CUDNN, STUB_CUDA).
#include "stub.h"

#include <cstring>

#if defined(STUB_CUBLAS) || defined(STUB_CUDNN)
// A handle is where its stream is kept.
struct Handle {
    void* stream;
};

static int make(void** handle, char const* name)
{
    dmoe_stub_call(name);
    *handle = new Handle{nullptr};
    return 0;
}

static int choose(void* handle, void* stream, char const* name)
{
    dmoe_stub_call(name);
    static_cast<Handle*>(handle)->stream = stream;
    return 0;
}

void* stubStreamOf(void* handle)
{
    return static_cast<Handle*>(handle)->stream;
}
#endif

#ifdef STUB_CUBLAS
STUB int cublasCreate_v2(void** handle) { return make(handle, "cublasCreate"); }
STUB int cublasSetStream_v2(void* handle, void* stream) { return choose(handle, stream, "cublasSetStream"); }
STUB int cublasGetMathMode(void*, int* mode)
{
    *mode = 0;
    return 0;
}
STUB char const* cublasGetStatusName(int) { return "a status of the stub"; }
STUB char const* cublasGetStatusString(int) { return "a status of the stub"; }
#endif

#ifdef STUB_CUBLASLT
STUB int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, void*, int* found)
{
    *found = 1; // one algorithm; the caller's array stays as it is
    return 0;
}
STUB int cublasLtMatmul(void*, void*, void*, void*, void*, void*, void*, void*, void*, void*, void*, void*, void*, void*,
    size_t, void* stream)
{
    dmoe_stub_library(stream, "cublasLtMatmul");
    return 0;
}
STUB int cublasLtMatrixTransform(void*, void*, void*, void*, void*, void*, void*, void*, void*, void*, void* stream)
{
    dmoe_stub_library(stream, "cublasLtMatrixTransform");
    return 0;
}
#endif

#ifdef STUB_CUDNN
STUB int cudnnCreate(void** handle) { return make(handle, "cudnnCreate"); }
STUB int cudnnSetStream(void* handle, void* stream) { return choose(handle, stream, "cudnnSetStream"); }
STUB int cudnnGetStream(void* handle, void** stream)
{
    *stream = stubStreamOf(handle);
    return 0;
}
STUB size_t cudnnGetVersion() { return 91300; }
STUB char const* cudnnGetErrorString(int) { return "a status of the stub"; }
STUB void cudnnGetLastErrorString(char* text, size_t size) { std::strncpy(text, "none", size); }
STUB int cudnnGetReductionWorkspaceSize(void*, void*, void*, void*, size_t* size)
{
    *size = 0;
    return 0;
}
STUB int cudnnGetReductionIndicesSize(void*, void*, void*, void*, size_t* size)
{
    *size = 0;
    return 0;
}
#endif

#ifdef STUB_CUDA
STUB int cuInit(unsigned) { return 100; } // no device: whoever asks the driver itself is told the truth
#endif
