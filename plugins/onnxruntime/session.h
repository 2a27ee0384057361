// What a session of ONNX Runtime and this library know of each other: who has the experts' weights, and how many kernels were
// made. A C interface, the same in libdmoe_cpu.so and libdmoe_onnxruntime.so.
//
// The session is named by its address, in decimal digits, in the session option "dmoe.session", which RegisterCustomOps reads.
// Without that option there is no session: weights are simply read, and nothing is counted.
#pragma once

#include <cstdint>

extern "C" {

typedef struct DmoeSession DmoeSession; // never freed: sessions of ONNX Runtime may outlive their makers

// Holds some of `count` expert ids of the layer whose gate_up tensor starts at `gate_up`, at least one: reorders `experts` so
// that they come first, and returns how many they are; 0 or less: failed. Until the release they may be read.
typedef int32_t (*DmoeAcquire)(void* context, void const* gate_up, int32_t* experts, int32_t count);
typedef void (*DmoeRelease)(void* context, void const* gate_up, int32_t const* experts, int32_t count);

// Both callbacks null: no source. Null is returned when a library that asks no source is given one. The callbacks must live as
// long as the session of ONNX Runtime, and are called by the threads that run it.
__attribute__((visibility("default"))) DmoeSession* dmoe_session_create(DmoeAcquire acquire, DmoeRelease release,
    void* context);
// Kernels made for nodes of this op, such as "DmoeLinear" (all: session.cpp). 0 for another.
__attribute__((visibility("default"))) int64_t dmoe_session_kernels(DmoeSession const* session, char const* op);
// Whether products of integers and of bfloat16 may round activations, from the next run of a kernel on; at first they may not.
__attribute__((visibility("default"))) void dmoe_session_set_products(DmoeSession* session, int32_t fast);
// In which order the session's quantised experts lie, from the next kernel made on: 1, as at first, by rows, as in a bundle's
// file; 2 in fragments (dmoe_export/ops/experts/fragments.py). Kernels that read another order are refused.
__attribute__((visibility("default"))) void dmoe_session_set_experts_layout(DmoeSession* session, int32_t layout);
// How many activations its experts know (activation.h). A library without this function computes silu whatever a node says.
__attribute__((visibility("default"))) int32_t dmoe_session_activations(void);
}

namespace dmoe {

extern bool const kAsksSource; // whether this library's experts op asks a source
extern int32_t const kExpertsLayout; // in which its kernels read quantised experts

// The session of this address, as decimal digits; throws std::runtime_error when it is none of this library.
DmoeSession* sessionAt(char const* address);

// Throws std::runtime_error where quantised experts lie in another order than this library's kernels read; `session` may be null.
void requireExpertsLayout(DmoeSession const* session);

// A node of this op has got its kernel; `session` may be null.
void countKernel(DmoeSession* session, char const* op);

// What dmoe_session_set_products said; false for null.
bool fastProducts(DmoeSession const* session);

// Some experts of one layer, held until the end of the scope.
class HeldExperts {
public:
    // Of experts begin … end − 1, at least one: all of them without a source. Throws std::runtime_error when the source fails.
    HeldExperts(DmoeSession const* session, void const* gateUp, int32_t* begin, int32_t* end);
    ~HeldExperts();
    HeldExperts(HeldExperts const&) = delete;
    HeldExperts& operator=(HeldExperts const&) = delete;

    int32_t const* begin() const { return mBegin; }
    int32_t* end() const { return mBegin + mCount; }

private:
    DmoeSession const* mSession;
    void const* mGateUp;
    int32_t* mBegin;
    int32_t mCount;
};

} // namespace dmoe
