#include "plugin.h"

using namespace nvinfer1;

namespace dmoe {
namespace {

constexpr int32_t kInputs = 6; // router_logits, expert_bias, position_ids, top_p, min_experts, coreset_size

} // namespace

BlockRoutePlugin* BlockRoutePlugin::create(FieldReader& fields)
{
    DmoeRouteAttributes a{};
    return readRouteAttributes(fields, name, a) ? new BlockRoutePlugin(a) : nullptr;
}

IPluginV3* BlockRoutePlugin::clone() noexcept
{
    return new (std::nothrow) BlockRoutePlugin(mAttributes);
}

int32_t BlockRoutePlugin::getOutputDataTypes(DataType* outputs, int32_t nbOutputs, DataType const*, int32_t) const noexcept
{
    if (nbOutputs != 3) {
        return -1;
    }
    outputs[0] = DataType::kINT32;
    outputs[1] = DataType::kFLOAT;
    outputs[2] = DataType::kBOOL;
    return 0;
}

int32_t BlockRoutePlugin::getOutputShapes(DimsExprs const* inputs, int32_t nbInputs, DimsExprs const*, int32_t,
    DimsExprs* outputs, int32_t nbOutputs, IExprBuilder& builder) noexcept
{
    if (nbInputs != kInputs || nbOutputs != 3 || inputs[0].nbDims != 3) {
        return -1;
    }
    outputs[2] = inputs[0]; // coreset [B, T, E]
    for (int32_t i = 0; i < 2; ++i) {
        outputs[i] = inputs[0];
        outputs[i].d[2] = builder.constant(mAttributes.experts_per_token);
    }
    return 0;
}

bool BlockRoutePlugin::supportsFormatCombination(int32_t position, DynamicPluginTensorDesc const* inOut, int32_t nbInputs,
    int32_t nbOutputs) noexcept
{
    constexpr DataType kTypes[] = {DataType::kFLOAT, DataType::kFLOAT, DataType::kINT64, DataType::kFLOAT,
        DataType::kINT64, DataType::kINT64, DataType::kINT32, DataType::kFLOAT, DataType::kBOOL};
    return nbInputs == kInputs && nbOutputs == 3 && linear(inOut[position].desc, kTypes[position]);
}

int32_t BlockRoutePlugin::enqueue(PluginTensorDesc const* inputDesc, PluginTensorDesc const*, void const* const* inputs,
    void* const* outputs, void*, cudaStream_t stream) noexcept
{
    auto const& logits = inputDesc[0].dims;
    int32_t const status = dmoe_block_route(&mAttributes, static_cast<int32_t>(logits.d[0]),
        static_cast<int32_t>(logits.d[1]), static_cast<int32_t>(logits.d[2]), static_cast<float const*>(inputs[0]),
        static_cast<float const*>(inputs[1]), static_cast<int64_t const*>(inputs[2]),
        static_cast<float const*>(inputs[3]), static_cast<int64_t const*>(inputs[4]),
        static_cast<int64_t const*>(inputs[5]), static_cast<int32_t*>(outputs[0]), static_cast<float*>(outputs[1]),
        static_cast<uint8_t*>(outputs[2]), stream);
    if (status != 0) {
        logError(std::string(name) + ": " + dmoe_error_string(status) + ".");
    }
    return status;
}

PluginFieldCollection const* BlockRoutePlugin::getFieldsToSerialize() noexcept
{
    mFields = Fields();
    addRouteAttributes(mFields, mAttributes);
    mFields.add(kBuildField, std::string(dmoe_build_id()));
    return mFields.collection();
}

} // namespace dmoe
