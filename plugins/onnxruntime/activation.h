// Attribute `activation` of a node with experts: DmoeExperts and DmoeMixture.
#pragma once

#include "common.h"

namespace dmoe {

// DMOE_ACTIVATION_*; silu where the node has none, as in all graphs from before the attribute.
inline int32_t activationOf(OrtKernelInfo const* info)
{
    constexpr char kName[] = "activation";
    OrtApi const& api = Ort::GetApi();
    auto const is = [](OrtStatus* status) { return Ort::Status(status).IsOK(); };
    size_t bytes = 0;
    int64_t integer = 0;
    float real = 0;
    if (!is(api.KernelInfoGetAttribute_string(info, kName, nullptr, &bytes))) {
        if (is(api.KernelInfoGetAttribute_int64(info, kName, &integer))
            || is(api.KernelInfoGetAttribute_float(info, kName, &real))) {
            throw std::runtime_error("attribute activation is a number where a text is needed.");
        }
        return DMOE_ACTIVATION_SILU;
    }
    auto const activation = Ort::ConstKernelInfo(info).GetAttribute<std::string>(kName);
    if (activation != "silu" && activation != "gelu_tanh") {
        throw std::runtime_error("activation is '" + activation + "' where 'silu' or 'gelu_tanh' is needed.");
    }
    return activation == "silu" ? DMOE_ACTIVATION_SILU : DMOE_ACTIVATION_GELU_TANH;
}

} // namespace dmoe
