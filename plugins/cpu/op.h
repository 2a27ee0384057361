// What the CPU's custom ops share, on top of the adapters of both libraries.
#pragma once

#include "../onnxruntime/common.h"
#include "experts.h"

namespace dmoe {

// On the threads of the session. They run no exception handlers of ours: the work does not throw.
inline void onThreads(void* context, size_t count, void (*work)(void*, size_t), void* argument)
{
    Ort::KernelContext(static_cast<OrtKernelContext*>(context)).ParallelFor(work, count, 0, argument);
}

// `bits` of a value, asked for where the type is bytes.
inline cpu::Format weightFormat(ONNXTensorElementDataType type, int64_t bits)
{
    switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16: return cpu::Format::kHalf;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16: return cpu::Format::kBFloat;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8: return bits == 8 ? cpu::Format::kInt8 : cpu::Format::kInt4;
    default: return cpu::Format::kFloat;
    }
}

// Throws for attributes of quantised weights that no kernel serves.
inline void checkQuantisation(int64_t bits, int64_t group)
{
    constexpr int64_t kLargestGroup = 1 << 20;
    if ((bits != 8 && bits != 4) || group < 32 || group > kLargestGroup || (group & (group - 1)) != 0) {
        throw std::runtime_error("bits " + std::to_string(bits) + " and group_size " + std::to_string(group)
            + " are not offered; bits are 8 or 4, group_size is a power of two from 32 to "
            + std::to_string(kLargestGroup) + ".");
    }
}

} // namespace dmoe
