#include "plugin.h"

#include "../../kernels/dmoe_kernels.h"

using namespace nvinfer1;

namespace dmoe {
namespace {

enum Input { kHidden, kIds, kWeights, kGateUp, kDown, kInputs, kSlots = kInputs, kGateUpPool, kDownPool, kAllInputs };
constexpr char kResidency[] = "residency";

DmoeExpertsShape shapeOf(Dims const& hidden, Dims const& ids, Dims const& gateUp, DataType type)
{
    DmoeExpertsShape shape{};
    shape.tokens = static_cast<int32_t>(hidden.d[0]);
    shape.places = static_cast<int32_t>(ids.d[1]);
    shape.experts = static_cast<int32_t>(gateUp.d[0]);
    shape.hidden = static_cast<int32_t>(hidden.d[1]);
    shape.width = static_cast<int32_t>(gateUp.d[1] / 2);
    shape.type = type == DataType::kBF16 ? 1 : 0;
    return shape;
}

bool sameSlab(Dims const& one, Dims const& other)
{
    return one.nbDims == 3 && other.nbDims == 3 && one.d[1] == other.d[1] && one.d[2] == other.d[2];
}

} // namespace

ExpertsPlugin* ExpertsPlugin::create(FieldReader& fields)
{
    int32_t const residency = fields.has(kResidency) ? fields.integer(kResidency) : 0;
    if (!fields.problem().empty() || residency < 0 || residency > 1) {
        logError(std::string(name) + ": attribute residency must be the integer 0 or 1.");
        return nullptr;
    }
    return new ExpertsPlugin(residency == 1);
}

int32_t ExpertsPlugin::inputCount() const noexcept
{
    return mResidency ? kAllInputs : kInputs;
}

IPluginV3* ExpertsPlugin::clone() noexcept
{
    return new (std::nothrow) ExpertsPlugin(mResidency);
}

int32_t ExpertsPlugin::getOutputDataTypes(DataType* outputs, int32_t nbOutputs, DataType const* inputs,
    int32_t nbInputs) const noexcept
{
    if (nbOutputs != 1 || nbInputs != inputCount()) {
        return -1;
    }
    outputs[0] = inputs[kHidden];
    return 0;
}

int32_t ExpertsPlugin::getOutputShapes(DimsExprs const* inputs, int32_t nbInputs, DimsExprs const*, int32_t,
    DimsExprs* outputs, int32_t nbOutputs, IExprBuilder&) noexcept
{
    if (nbInputs != inputCount() || nbOutputs != 1 || inputs[kHidden].nbDims != 2) {
        return -1;
    }
    outputs[0] = inputs[kHidden];
    return 0;
}

bool ExpertsPlugin::supportsFormatCombination(int32_t position, DynamicPluginTensorDesc const* inOut, int32_t nbInputs,
    int32_t nbOutputs) noexcept
{
    if (nbInputs != inputCount() || nbOutputs != 1) {
        return false;
    }
    auto const& tensor = inOut[position].desc;
    if (mResidency && position == kSlots) {
        return linear(tensor, DataType::kINT32);
    }
    switch (position) {
    case kHidden: return linear(tensor, DataType::kHALF) || linear(tensor, DataType::kBF16);
    case kIds: return linear(tensor, DataType::kINT32);
    case kWeights: return linear(tensor, DataType::kFLOAT);
    default: return linear(tensor, inOut[kHidden].desc.type); // weights and output have the hidden state's type
    }
}

size_t ExpertsPlugin::getWorkspaceSize(DynamicPluginTensorDesc const* inputs, int32_t, DynamicPluginTensorDesc const*,
    int32_t) const noexcept
{
    auto const shape = shapeOf(inputs[kHidden].max, inputs[kIds].max, inputs[kGateUp].max, inputs[kHidden].desc.type);
    int64_t const bytes = dmoe_experts_workspace_bytes(&shape);
    if (bytes < 0) {
        logError(std::string(name) + ": " + dmoe_error_string(static_cast<int32_t>(bytes)) + ".");
        return 0; // enqueue refuses the same shape again
    }
    return static_cast<size_t>(bytes);
}

int32_t ExpertsPlugin::enqueue(PluginTensorDesc const* inputDesc, PluginTensorDesc const*, void const* const* inputs,
    void* const* outputs, void* workspace, cudaStream_t stream) noexcept
{
    auto const shape
        = shapeOf(inputDesc[kHidden].dims, inputDesc[kIds].dims, inputDesc[kGateUp].dims, inputDesc[kHidden].type);
    DmoeExpertPool pool{};
    if (mResidency) {
        if (inputDesc[kSlots].dims.d[0] != shape.experts || !sameSlab(inputDesc[kGateUp].dims, inputDesc[kGateUpPool].dims)
            || !sameSlab(inputDesc[kDown].dims, inputDesc[kDownPool].dims)
            || inputDesc[kGateUpPool].dims.d[0] != inputDesc[kDownPool].dims.d[0]) {
            logError(std::string(name) + ": the pool of resident experts does not have the shape of the experts.");
            return DMOE_ERROR_SHAPE;
        }
        pool = {static_cast<int32_t>(inputDesc[kGateUpPool].dims.d[0]), static_cast<int32_t const*>(inputs[kSlots]),
            inputs[kGateUpPool], inputs[kDownPool]};
    }
    int32_t const status = dmoe_experts_resident(&shape, mResidency ? &pool : nullptr, inputs[kHidden],
        static_cast<int32_t const*>(inputs[kIds]), static_cast<float const*>(inputs[kWeights]), inputs[kGateUp],
        inputs[kDown], outputs[0], workspace, stream);
    if (status != 0) {
        logError(std::string(name) + ": " + dmoe_error_string(status) + ".");
    }
    return status;
}

PluginFieldCollection const* ExpertsPlugin::getFieldsToSerialize() noexcept
{
    mFields = Fields();
    if (mResidency) {
        mFields.add(kResidency, int32_t{1});
    }
    mFields.add(kBuildField, std::string(dmoe_build_id()));
    return mFields.collection();
}

} // namespace dmoe
