// The books of an expert budget: which experts of a mapped file are in memory, and which leave when others must come.
//
// Pages come and go only here, an expert at a time: MADV_POPULATE_READ maps the slabs of an expert before it is used,
// MADV_DONTNEED gives them back when room is wanted. So what is in memory is counted, not watched. A C interface, for
// dmoe_export/runtime/cpu/mapped_experts.py; every function may be called by any thread. An expert's number is
// layer * experts + its id.
#pragma once

#include <cstdint>

#pragma GCC visibility push(default)
extern "C" {

typedef struct DmoeResidency DmoeResidency;

typedef struct {
    int64_t brought, missed, dropped, peak; // experts: in the background, waited for, given back; most at once
    double bringSeconds, missSeconds, dropSeconds;
} DmoeResidencyTotals;

// `tensors` [layers, parts]: where each tensor of each layer starts, gate_up first; `slabs` [parts]: bytes of an expert in it, in
// whole pages. At most `capacity` experts are in memory at once, at least one.
DmoeResidency* dmoe_residency_create(void const* const* tensors, int64_t const* slabs, int32_t layers, int32_t parts,
    int32_t experts, int32_t capacity);
// No call may be under way, nor come.
void dmoe_residency_destroy(DmoeResidency* books);

// A DmoeAcquire and a DmoeRelease (../onnxruntime/session.h), `books` being their context. First those in memory, meanwhile the
// disk reads the others; these as room allows, waiting for other threads. Fails where the file has lost an expert.
int32_t dmoe_residency_acquire(void* books, void const* gate_up, int32_t* experts, int32_t count);
void dmoe_residency_release(void* books, void const* gate_up, int32_t const* experts, int32_t count);

// Residents, by number, change at once. Those that come are brought in the background, as far as there is room; those that
// leave go when room is wanted.
void dmoe_residency_move(DmoeResidency* books, int32_t const* bring, int32_t bringing, int32_t const* evict, int32_t evicting);
// Until everything moved so far is in memory.
void dmoe_residency_wait(DmoeResidency* books);
// Ends the threads in the background. Experts can be acquired as before.
void dmoe_residency_close(DmoeResidency* books);

void dmoe_residency_totals(DmoeResidency* books, DmoeResidencyTotals* totals);
// Per number: 1 in memory + 2 resident + 4 held by somebody.
void dmoe_residency_states(DmoeResidency* books, uint8_t* states);
}
#pragma GCC visibility pop
