// Attributes of the plugins that route: DmoeBlockRoute and DmoeRouter.
#pragma once

#include "../kernels/dmoe_kernels.h"
#include "common.h"

#include <array>
#include <utility>

namespace dmoe {

constexpr std::array<std::pair<char const*, nvinfer1::PluginFieldType>, 8> kRouteAttributes{{
    {"mode", nvinfer1::PluginFieldType::kCHAR},
    {"block_length", nvinfer1::PluginFieldType::kINT32},
    {"experts_per_token", nvinfer1::PluginFieldType::kINT32},
    {"num_groups", nvinfer1::PluginFieldType::kINT32},
    {"groups_kept", nvinfer1::PluginFieldType::kINT32},
    {"routed_scaling", nvinfer1::PluginFieldType::kFLOAT32},
    {"score_function", nvinfer1::PluginFieldType::kCHAR},
    {"renormalise", nvinfer1::PluginFieldType::kINT32},
}};

// Whether all are there and known; else the host's logger is told which is not.
bool readRouteAttributes(FieldReader& fields, char const* plugin, DmoeRouteAttributes& attributes);

void addRouteAttributes(Fields& fields, DmoeRouteAttributes const& attributes);

} // namespace dmoe
