#include "plugin.h"

#include <string>

using namespace nvinfer1;

namespace dmoe {
namespace {

enum Input { kX, kDelta, kWeight, kInputs };
constexpr int32_t kOutputs = 2; // total, normed
constexpr char kEps[] = "eps";

// What is wrong with the sizes, as half a sentence; empty if nothing. The number of tokens counts where it is known.
std::string complaint(Dims const& x, Dims const& delta, Dims const& weight)
{
    if (x.nbDims != 2 || delta.nbDims != 2 || weight.nbDims != 1) {
        return "x and delta must have two axes, weight one";
    }
    if (delta.d[0] != x.d[0] || delta.d[1] != x.d[1] || weight.d[0] != x.d[1]) {
        return "delta has shape [" + std::to_string(delta.d[0]) + ", " + std::to_string(delta.d[1]) + "] and weight "
            + std::to_string(weight.d[0]) + " values where x has shape [" + std::to_string(x.d[0]) + ", "
            + std::to_string(x.d[1]) + "]";
    }
    if (x.d[1] < 8 || x.d[1] % 8 != 0 || x.d[1] > 1 << 18) {
        return "the hidden size " + std::to_string(x.d[1]) + " must be a multiple of 8, at most 262144";
    }
    return {};
}

} // namespace

AddNormPlugin* AddNormPlugin::create(FieldReader& fields)
{
    float const eps = fields.real(kEps);
    if (!fields.problem().empty()) {
        logError(std::string(name) + ": " + fields.problem() + ".");
        return nullptr;
    }
    return new AddNormPlugin(eps);
}

IPluginV3* AddNormPlugin::clone() noexcept
{
    return new (std::nothrow) AddNormPlugin(mEps);
}

int32_t AddNormPlugin::getOutputDataTypes(DataType* outputs, int32_t nbOutputs, DataType const* inputs,
    int32_t nbInputs) const noexcept
{
    if (nbInputs != kInputs || nbOutputs != kOutputs) {
        return refuse(std::to_string(nbInputs) + " inputs where " + std::to_string(kInputs) + " are needed");
    }
    outputs[0] = outputs[1] = inputs[kX];
    return 0;
}

int32_t AddNormPlugin::getOutputShapes(DimsExprs const* inputs, int32_t nbInputs, DimsExprs const*, int32_t,
    DimsExprs* outputs, int32_t nbOutputs, IExprBuilder&) noexcept
{
    if (nbInputs != kInputs || nbOutputs != kOutputs) {
        return -1;
    }
    outputs[0] = outputs[1] = inputs[kX];
    return 0;
}

bool AddNormPlugin::supportsFormatCombination(int32_t position, DynamicPluginTensorDesc const* inOut, int32_t nbInputs,
    int32_t nbOutputs) noexcept
{
    if (nbInputs != kInputs || nbOutputs != kOutputs) {
        return false;
    }
    auto const& tensor = inOut[position].desc;
    if (position == kX) {
        return linear(tensor, DataType::kHALF) || linear(tensor, DataType::kBF16);
    }
    return linear(tensor, inOut[kX].desc.type);
}

int32_t AddNormPlugin::configurePlugin(DynamicPluginTensorDesc const* inputs, int32_t nbInputs,
    DynamicPluginTensorDesc const*, int32_t) noexcept
{
    if (nbInputs != kInputs) {
        return DMOE_ERROR_SHAPE;
    }
    std::string const problem = complaint(inputs[kX].max, inputs[kDelta].max, inputs[kWeight].max);
    return problem.empty() ? 0 : refuse(problem);
}

int32_t AddNormPlugin::enqueue(PluginTensorDesc const* inputDesc, PluginTensorDesc const*, void const* const* inputs,
    void* const* outputs, void*, cudaStream_t stream) noexcept
{
    auto const& x = inputDesc[kX].dims;
    std::string const problem = complaint(x, inputDesc[kDelta].dims, inputDesc[kWeight].dims);
    if (!problem.empty()) {
        return refuse(problem);
    }
    DmoeAddNormShape const shape{static_cast<int32_t>(x.d[0]), static_cast<int32_t>(x.d[1]),
        inputDesc[kX].type == DataType::kBF16 ? DMOE_TYPE_BF16 : DMOE_TYPE_FP16};
    int32_t const status =
        dmoe_add_norm(&shape, mEps, inputs[kX], inputs[kDelta], inputs[kWeight], outputs[0], outputs[1], stream);
    if (status != 0) {
        refuse(dmoe_error_string(status));
    }
    return status;
}

PluginFieldCollection const* AddNormPlugin::getFieldsToSerialize() noexcept
{
    mFields = Fields();
    mFields.add(kEps, mEps);
    mFields.add(kBuildField, std::string(dmoe_build_id()));
    return mFields.collection();
}

} // namespace dmoe
