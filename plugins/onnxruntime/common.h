// What both custom ops share. The C++ wrapper of ONNX Runtime is headers only: nothing is linked, the API comes in
// through RegisterCustomOps, in the version of these headers.
#pragma once

#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>
#undef ORT_API_MANUAL_INIT

#include <cstdint>
#include <exception>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "dmoe_kernels.h"
#include "session.h"

// GetScratchBuffer and KernelInfoGetAllocator came with 18.
static_assert(ORT_API_VERSION >= 18, "needs the headers of ONNX Runtime 1.18 or later");

namespace dmoe {

#ifdef DMOE_ONNXRUNTIME_CPU
constexpr char kProvider[] = "CPUExecutionProvider";
#else
constexpr char kProvider[] = "CUDAExecutionProvider";
#endif

// The adapters throw one sentence; this turns it into the status ONNX Runtime passes on.
template <class Work>
OrtStatus* guarded(char const* op, Work&& work) noexcept
{
    try {
        work();
        return nullptr;
    } catch (std::exception const& error) {
        return Ort::GetApi().CreateStatus(ORT_INVALID_ARGUMENT, (std::string(op) + ": " + error.what()).c_str());
    }
}

// A kernel's return code as an exception.
inline void check(int64_t code)
{
    if (code != 0) {
        throw std::runtime_error(std::string(dmoe_error_string(static_cast<int>(code))) + ".");
    }
}

// One input with its shape; the element type is the registered one, which ONNX Runtime has checked.
class Input {
public:
    Input(OrtKernelContext* context, size_t index, char const* name)
        : mName(name), mValue(Ort::KernelContext(context).GetInput(index))
    {
        if (!mValue) {
            throw std::runtime_error(mName + " is missing, but every input is needed.");
        }
        mShape = mValue.GetTensorTypeAndShapeInfo().GetShape();
    }

    // −1 in `shape` takes any size.
    void expect(std::vector<int64_t> const& shape) const
    {
        bool fits = shape.size() == mShape.size();
        for (size_t i = 0; fits && i < shape.size(); ++i) {
            fits = shape[i] < 0 || shape[i] == mShape[i];
        }
        if (!fits) {
            throw std::runtime_error(mName + " has shape " + text(mShape) + " where " + text(shape) + " is needed.");
        }
    }

    int32_t size(size_t axis) const
    {
        if (mShape.at(axis) > std::numeric_limits<int32_t>::max()) {
            throw std::runtime_error(mName + " has shape " + text(mShape) + ", more than an int32 counts.");
        }
        return static_cast<int32_t>(mShape[axis]);
    }

    template <class T>
    T const* data() const
    {
        return static_cast<T const*>(mValue.GetTensorRawData());
    }

private:
    static std::string text(std::vector<int64_t> const& shape)
    {
        std::string all;
        for (int64_t const size : shape) {
            all += (all.empty() ? "" : ", ") + (size < 0 ? std::string("any") : std::to_string(size));
        }
        return "[" + all + "]";
    }

    std::string mName;
    Ort::ConstValue mValue;
    std::vector<int64_t> mShape;
};

// An output's memory; null when the graph leaves the output out.
template <class T>
T* output(OrtKernelContext* context, size_t index, std::vector<int64_t> const& shape)
{
    auto value = Ort::KernelContext(context).GetOutput(index, shape);
    return value ? static_cast<T*>(value.GetTensorMutableRawData()) : nullptr;
}

// The CUDA stream of the run; null on the CPU.
inline void* stream(OrtKernelContext* context)
{
#ifdef DMOE_ONNXRUNTIME_CPU
    static_cast<void>(context);
    return nullptr;
#else
    return Ort::KernelContext(context).GetGPUComputeStream();
#endif
}

// An op of one session, or of all that name none (`session` null); lives as long as the process, as the sessions do.
template <class Op, class Kernel>
class SessionOp : public Ort::CustomOpBase<Op, Kernel, true> {
public:
    explicit SessionOp(DmoeSession* session) : mSession(session) {}

    char const* GetExecutionProviderType() const { return kProvider; }

    OrtStatus* CreateKernelV2(OrtApi const&, OrtKernelInfo const* info, void** kernel) const noexcept
    {
        auto const* const op = static_cast<Op const*>(this);
        return guarded(op->GetName(), [&] {
            *kernel = op->makeKernel(info);
            countKernel(mSession, op->GetName());
        });
    }

protected:
    DmoeSession* session() const { return mSession; }

private:
    DmoeSession* mSession;
};

void addAddNorm(Ort::CustomOpDomain& domain, DmoeSession* session);
void addBlockRoute(Ort::CustomOpDomain& domain, DmoeSession* session);
void addExperts(Ort::CustomOpDomain& domain, DmoeSession* session);
void addHead(Ort::CustomOpDomain& domain, DmoeSession* session);
void addMixture(Ort::CustomOpDomain& domain, DmoeSession* session);
void addRouter(Ort::CustomOpDomain& domain, DmoeSession* session);
void addSelfAttention(Ort::CustomOpDomain& domain, DmoeSession* session);
void addLinear(Ort::CustomOpDomain& domain, DmoeSession* session);
void addAttention(Ort::CustomOpDomain& domain, DmoeSession* session);

void addOps(Ort::CustomOpDomain& domain, DmoeSession* session); // all of this library

} // namespace dmoe
