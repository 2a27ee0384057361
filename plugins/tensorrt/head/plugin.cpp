#include "plugin.h"

#include "../../kernels/workspace.h"

#include <algorithm>

using namespace nvinfer1;

namespace dmoe {
namespace {

enum Input { kHidden, kNorm, kWeight, kRows, kKept, kInputs };
constexpr char kEps[] = "eps", kMaskId[] = "mask_id";

// The kernel's shape from the dimensions of the inputs.
DmoeHeadShape shapeOf(InputDims const& inputs, DataType type)
{
    DmoeHeadShape shape{};
    shape.rows = static_cast<int32_t>(inputs[kRows].d[0]);
    shape.tokens = shape.rows > 0 ? static_cast<int32_t>(inputs[kHidden].d[0] / shape.rows) : 0;
    shape.wanted = static_cast<int32_t>(inputs[kRows].d[1]);
    shape.kept = static_cast<int32_t>(inputs[kKept].d[0]);
    shape.hidden = static_cast<int32_t>(inputs[kHidden].d[1]);
    shape.vocabulary = static_cast<int32_t>(inputs[kWeight].d[0]);
    shape.type = type == DataType::kBF16 ? DMOE_TYPE_BF16 : DMOE_TYPE_FP16;
    return shape;
}

// What is wrong with sizes that no profile leaves open, as half a sentence; empty if nothing.
std::string complaint(InputDims const& inputs)
{
    if (inputs[kHidden].nbDims != 2 || inputs[kNorm].nbDims != 1 || inputs[kWeight].nbDims != 2
        || inputs[kRows].nbDims != 2 || inputs[kKept].nbDims != 1) {
        return "hidden, weight and logit_rows must have two axes, norm and logits_kept one";
    }
    int64_t const size = inputs[kHidden].d[1];
    if (inputs[kNorm].d[0] != size || inputs[kWeight].d[1] != size) {
        return "norm has " + std::to_string(inputs[kNorm].d[0]) + " values and weight rows of "
            + std::to_string(inputs[kWeight].d[1]) + " where hidden has " + std::to_string(size);
    }
    return {};
}

// Sizes of a run that depend on each other: whole rows of tokens, and no more logits kept than wanted.
std::string complaintOfRun(InputDims const& inputs)
{
    int64_t const tokens = inputs[kHidden].d[0], rows = inputs[kRows].d[0];
    if (rows > 0 ? tokens % rows != 0 : tokens != 0) {
        return "hidden has " + std::to_string(tokens) + " tokens, no multiple of the " + std::to_string(rows)
            + " rows of logit_rows";
    }
    if (inputs[kKept].d[0] > inputs[kRows].d[1]) {
        return "logits_kept has " + std::to_string(inputs[kKept].d[0]) + " places, logit_rows only "
            + std::to_string(inputs[kRows].d[1]);
    }
    return {};
}

// Bytes of the largest run, or a negative DMOE_ERROR_*.
int64_t workspaceOf(DynamicPluginTensorDesc const* inputs)
{
    auto shape = shapeOf(InputDims(inputs, kInputs, mostOf), inputs[kHidden].desc.type);
    shape.tokens = 1; // how many there are at most says nothing about any run, and the workspace does not depend on it
    shape.kept = 0;
    return dmoe_head_workspace_bytes(&shape);
}

} // namespace

HeadPlugin* HeadPlugin::create(FieldReader& fields)
{
    DmoeHeadAttributes a{};
    a.eps = fields.real(kEps);
    a.mask_id = fields.integer(kMaskId);
    if (!fields.problem().empty()) {
        logError(std::string(name) + ": " + fields.problem() + ".");
        return nullptr;
    }
    return new HeadPlugin(a);
}

IPluginV3* HeadPlugin::clone() noexcept
{
    return new (std::nothrow) HeadPlugin(mAttributes);
}

int32_t HeadPlugin::getOutputDataTypes(DataType* outputs, int32_t nbOutputs, DataType const*, int32_t nbInputs) const noexcept
{
    if (nbInputs != kInputs || nbOutputs != 3) {
        return refuse(std::to_string(nbInputs) + " inputs where " + std::to_string(kInputs) + " are needed");
    }
    outputs[0] = DataType::kINT64;
    outputs[1] = DataType::kFLOAT;
    outputs[2] = DataType::kFLOAT;
    return 0;
}

int32_t HeadPlugin::getOutputShapes(DimsExprs const* inputs, int32_t nbInputs, DimsExprs const*, int32_t,
    DimsExprs* outputs, int32_t nbOutputs, IExprBuilder&) noexcept
{
    if (nbInputs != kInputs || nbOutputs != 3 || inputs[kRows].nbDims != 2 || inputs[kWeight].nbDims != 2
        || inputs[kKept].nbDims != 1) {
        return -1;
    }
    outputs[0] = inputs[kRows]; // [B, M]
    outputs[1] = inputs[kRows];
    outputs[2].nbDims = 3; // [B, L, V]
    outputs[2].d[0] = inputs[kRows].d[0];
    outputs[2].d[1] = inputs[kKept].d[0];
    outputs[2].d[2] = inputs[kWeight].d[0];
    return 0;
}

bool HeadPlugin::supportsFormatCombination(int32_t position, DynamicPluginTensorDesc const* inOut, int32_t nbInputs,
    int32_t nbOutputs) noexcept
{
    if (nbInputs != kInputs || nbOutputs != 3) {
        return false;
    }
    auto const& tensor = inOut[position].desc;
    switch (position) {
    case kHidden: return linear(tensor, DataType::kHALF) || linear(tensor, DataType::kBF16);
    case kNorm:
    case kWeight: return linear(tensor, inOut[kHidden].desc.type);
    case kRows:
    case kKept:
    case kInputs: return linear(tensor, DataType::kINT64); // and token_ids, the first output
    default: return linear(tensor, DataType::kFLOAT);
    }
}

int32_t HeadPlugin::configurePlugin(DynamicPluginTensorDesc const* inputs, int32_t nbInputs,
    DynamicPluginTensorDesc const*, int32_t) noexcept
{
    if (nbInputs != kInputs) {
        return DMOE_ERROR_SHAPE;
    }
    std::string const problem = complaint(InputDims(inputs, kInputs, mostOf));
    if (!problem.empty()) {
        return refuse(problem);
    }
    int64_t const bytes = workspaceOf(inputs);
    return bytes < 0 ? refuse(dmoe_error_string(static_cast<int32_t>(bytes))) : 0;
}

size_t HeadPlugin::getWorkspaceSize(DynamicPluginTensorDesc const* inputs, int32_t, DynamicPluginTensorDesc const*,
    int32_t) const noexcept
{
    return roomForWorkspace(std::max<int64_t>(workspaceOf(inputs), 0)); // what is out of range was refused before
}

int32_t HeadPlugin::enqueue(PluginTensorDesc const* inputDesc, PluginTensorDesc const*, void const* const* inputs,
    void* const* outputs, void* workspace, cudaStream_t stream) noexcept
{
    InputDims const dims(inputDesc, kInputs, dimsOf);
    for (std::string const& problem : {complaint(dims), complaintOfRun(dims)}) {
        if (!problem.empty()) {
            return refuse(problem);
        }
    }
    auto const shape = shapeOf(dims, inputDesc[kHidden].type);
    int32_t const status = dmoe_head(&shape, &mAttributes, inputs[kHidden], inputs[kNorm], inputs[kWeight],
        static_cast<int64_t const*>(inputs[kRows]), static_cast<int64_t*>(outputs[0]), static_cast<float*>(outputs[1]),
        static_cast<float*>(outputs[2]), alignedWorkspace(workspace), stream);
    if (status != 0) {
        refuse(dmoe_error_string(status));
    }
    return status;
}

PluginFieldCollection const* HeadPlugin::getFieldsToSerialize() noexcept
{
    mFields = Fields();
    mFields.add(kEps, mAttributes.eps);
    mFields.add(kMaskId, mAttributes.mask_id);
    mFields.add(kBuildField, std::string(dmoe_build_id()));
    return mFields.collection();
}

} // namespace dmoe
