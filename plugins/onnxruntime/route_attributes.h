// Attributes of a node that routes: DmoeBlockRoute and DmoeRouter.
#pragma once

#include "common.h"

namespace dmoe {

constexpr char const* kRouteModes[] = {"token", "top_p", "top_c"};

inline int32_t routeInteger(Ort::ConstKernelInfo const& info, char const* name)
{
    int64_t const value = info.GetAttribute<int64_t>(name);
    if (value < std::numeric_limits<int32_t>::min() || value > std::numeric_limits<int32_t>::max()) {
        throw std::runtime_error("attribute " + std::string(name) + " is " + std::to_string(value) + ", not an int32.");
    }
    return static_cast<int32_t>(value);
}

inline DmoeRouteAttributes routeAttributesOf(Ort::ConstKernelInfo const& info)
{
    DmoeRouteAttributes a{};
    auto const mode = info.GetAttribute<std::string>("mode");
    auto const score = info.GetAttribute<std::string>("score_function");
    a.mode = -1;
    for (int32_t i = 0; i < 3; ++i) {
        if (mode == kRouteModes[i]) {
            a.mode = i;
        }
    }
    if (a.mode < 0) {
        throw std::runtime_error("mode is '" + mode + "' where 'token', 'top_p' or 'top_c' is needed.");
    }
    if (score != "softmax" && score != "sigmoid") {
        throw std::runtime_error("score_function is '" + score + "' where 'sigmoid' or 'softmax' is needed.");
    }
    a.softmax = score == "softmax";
    a.block_length = routeInteger(info, "block_length");
    a.experts_per_token = routeInteger(info, "experts_per_token");
    a.num_groups = routeInteger(info, "num_groups");
    a.groups_kept = routeInteger(info, "groups_kept");
    a.routed_scaling = info.GetAttribute<float>("routed_scaling");
    a.renormalise = routeInteger(info, "renormalise") != 0;
    return a;
}

} // namespace dmoe
