// What the launches of DmoeExperts tell each other about the pairs (token, place).
#pragma once

#include "device.cuh"

namespace dmoe {

constexpr int kMaxExperts = 1024;

// Where the pairs of each expert are. A pair is token · places + place; `pairs` lists expert 0's, then expert 1's, …,
// each in ascending order; an expert's position in that list is also its row in the activations.
struct Groups {
    int *count, *first, *pairs;  // [kMaxExperts], [kMaxExperts], [N·k]
};

}  // namespace dmoe
