#include "plugin.h"

#include "../../kernels/workspace.h"

#include <algorithm>
#include <string>

using namespace nvinfer1;

namespace dmoe {
namespace {

enum Input { kHidden, kWeight, kBias, kPositions, kTopP, kMinExperts, kCoresetSize, kInputs };
constexpr int32_t kOutputs = 3; // expert_ids, expert_weights, router_logits

// The kernel's shape from the dimensions of the inputs.
DmoeRouterShape shapeOf(InputDims const& inputs, DataType type)
{
    DmoeRouterShape shape{};
    shape.rows = static_cast<int32_t>(inputs[kPositions].d[0]);
    shape.tokens = static_cast<int32_t>(inputs[kPositions].d[1]);
    shape.experts = static_cast<int32_t>(inputs[kWeight].d[0]);
    shape.hidden = static_cast<int32_t>(inputs[kHidden].d[1]);
    shape.type = type == DataType::kBF16 ? DMOE_TYPE_BF16 : DMOE_TYPE_FP16;
    return shape;
}

// What is wrong with sizes that no profile leaves open, as half a sentence; empty if nothing.
std::string complaint(InputDims const& inputs)
{
    if (inputs[kHidden].nbDims != 2 || inputs[kWeight].nbDims != 2 || inputs[kBias].nbDims != 1
        || inputs[kPositions].nbDims != 2) {
        return "hidden, router_weight and position_ids must have two axes, expert_bias one";
    }
    int64_t const size = inputs[kHidden].d[1], experts = inputs[kWeight].d[0];
    if (inputs[kWeight].d[1] != size) {
        return "router_weight has rows of " + std::to_string(inputs[kWeight].d[1]) + " where hidden has "
            + std::to_string(size);
    }
    if (inputs[kBias].d[0] != experts) {
        return "expert_bias has " + std::to_string(inputs[kBias].d[0]) + " values where router_weight has "
            + std::to_string(experts) + " experts";
    }
    constexpr char const* kNames[] = {"top_p", "min_experts", "coreset_size"};
    for (int32_t i = kTopP; i < kInputs; ++i) {
        if (inputs[i].nbDims != 1 || inputs[i].d[0] != 1) {
            return std::string(kNames[i - kTopP]) + " must be one number, of shape [1]";
        }
    }
    return {};
}

} // namespace

RouterPlugin* RouterPlugin::create(FieldReader& fields)
{
    DmoeRouteAttributes a{};
    return readRouteAttributes(fields, name, a) ? new RouterPlugin(a) : nullptr;
}

IPluginV3* RouterPlugin::clone() noexcept
{
    return new (std::nothrow) RouterPlugin(mAttributes);
}

int32_t RouterPlugin::getOutputDataTypes(DataType* outputs, int32_t nbOutputs, DataType const*,
    int32_t nbInputs) const noexcept
{
    if (nbInputs != kInputs || nbOutputs != kOutputs) {
        return refuse(std::to_string(nbInputs) + " inputs where " + std::to_string(kInputs) + " are needed");
    }
    outputs[0] = DataType::kINT32;
    outputs[1] = DataType::kFLOAT;
    outputs[2] = DataType::kFLOAT;
    return 0;
}

int32_t RouterPlugin::getOutputShapes(DimsExprs const* inputs, int32_t nbInputs, DimsExprs const*, int32_t,
    DimsExprs* outputs, int32_t nbOutputs, IExprBuilder& builder) noexcept
{
    if (nbInputs != kInputs || nbOutputs != kOutputs || inputs[kHidden].nbDims != 2 || inputs[kWeight].nbDims != 2
        || inputs[kPositions].nbDims != 2) {
        return -1;
    }
    for (int32_t i = 0; i < 2; ++i) { // [N, k]
        outputs[i] = inputs[kHidden];
        outputs[i].d[1] = builder.constant(mAttributes.experts_per_token);
    }
    outputs[2].nbDims = 3; // [B, T, E]
    outputs[2].d[0] = inputs[kPositions].d[0];
    outputs[2].d[1] = inputs[kPositions].d[1];
    outputs[2].d[2] = inputs[kWeight].d[0];
    return 0;
}

bool RouterPlugin::supportsFormatCombination(int32_t position, DynamicPluginTensorDesc const* inOut, int32_t nbInputs,
    int32_t nbOutputs) noexcept
{
    if (nbInputs != kInputs || nbOutputs != kOutputs) {
        return false;
    }
    auto const& tensor = inOut[position].desc;
    switch (position) {
    case kHidden: return linear(tensor, DataType::kHALF) || linear(tensor, DataType::kBF16);
    case kPositions:
    case kMinExperts:
    case kCoresetSize: return linear(tensor, DataType::kINT64);
    case kInputs: return linear(tensor, DataType::kINT32); // expert_ids, the first output
    default: return linear(tensor, DataType::kFLOAT);
    }
}

int32_t RouterPlugin::configurePlugin(DynamicPluginTensorDesc const* inputs, int32_t nbInputs,
    DynamicPluginTensorDesc const*, int32_t) noexcept
{
    if (nbInputs != kInputs) {
        return DMOE_ERROR_SHAPE;
    }
    std::string const problem = complaint(InputDims(inputs, kInputs, mostOf));
    if (!problem.empty()) {
        return refuse(problem);
    }
    auto shape = shapeOf(InputDims(inputs, kInputs, mostOf), inputs[kHidden].desc.type);
    if (int64_t const bytes = dmoe_router_workspace_bytes(&shape); bytes < 0) {
        return refuse(dmoe_error_string(static_cast<int32_t>(bytes)));
    }
    shape.tokens = 0; // asks of the attributes alone
    int32_t const status = dmoe_router(&shape, &mAttributes, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr,
        nullptr, nullptr, nullptr, nullptr, nullptr);
    return status ? refuse(dmoe_error_string(status)) : 0;
}

size_t RouterPlugin::getWorkspaceSize(DynamicPluginTensorDesc const* inputs, int32_t, DynamicPluginTensorDesc const*,
    int32_t) const noexcept
{
    auto const shape = shapeOf(InputDims(inputs, kInputs, mostOf), inputs[kHidden].desc.type);
    return roomForWorkspace(std::max<int64_t>(dmoe_router_workspace_bytes(&shape), 0)); // what is out of range was refused
}

int32_t RouterPlugin::enqueue(PluginTensorDesc const* inputDesc, PluginTensorDesc const*, void const* const* inputs,
    void* const* outputs, void* workspace, cudaStream_t stream) noexcept
{
    InputDims const dims(inputDesc, kInputs, dimsOf);
    std::string problem = complaint(dims);
    auto const shape = shapeOf(dims, inputDesc[kHidden].type);
    if (problem.empty() && dims[kHidden].d[0] != dims[kPositions].d[0] * dims[kPositions].d[1]) {
        problem = "hidden has " + std::to_string(dims[kHidden].d[0]) + " tokens where position_ids has "
            + std::to_string(dims[kPositions].d[0]) + " rows of " + std::to_string(dims[kPositions].d[1]);
    }
    if (!problem.empty()) {
        return refuse(problem);
    }
    int32_t const status = dmoe_router(&shape, &mAttributes, inputs[kHidden], static_cast<float const*>(inputs[kWeight]),
        static_cast<float const*>(inputs[kBias]), static_cast<int64_t const*>(inputs[kPositions]),
        static_cast<float const*>(inputs[kTopP]), static_cast<int64_t const*>(inputs[kMinExperts]),
        static_cast<int64_t const*>(inputs[kCoresetSize]), static_cast<int32_t*>(outputs[0]),
        static_cast<float*>(outputs[1]), static_cast<float*>(outputs[2]), alignedWorkspace(workspace), stream);
    if (status != 0) {
        refuse(dmoe_error_string(status));
    }
    return status;
}

PluginFieldCollection const* RouterPlugin::getFieldsToSerialize() noexcept
{
    mFields = Fields();
    addRouteAttributes(mFields, mAttributes);
    mFields.add(kBuildField, std::string(dmoe_build_id()));
    return mFields.collection();
}

} // namespace dmoe
