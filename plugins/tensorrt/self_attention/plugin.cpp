#include "plugin.h"

#include "../../kernels/workspace.h"

using namespace nvinfer1;

namespace dmoe {
namespace {

enum Input { kQkv, kCos, kSin, kPositions, kPastPositions, kPastKey, kPastValue, kQueryNorm, kKeyNorm };
constexpr char kBlockLength[] = "block_length", kEps[] = "eps", kHeadNorm[] = "head_norm";

} // namespace

SelfAttentionPlugin::SelfAttentionPlugin(int32_t blockLength, float eps, bool headNorm)
    : mBlockLength(blockLength), mEps(eps), mHeadNorm(headNorm)
{
}

SelfAttentionPlugin* SelfAttentionPlugin::create(FieldReader& fields)
{
    int32_t const blockLength = fields.integer(kBlockLength), headNorm = fields.integer(kHeadNorm);
    float const eps = fields.real(kEps);
    std::string problem = fields.problem();
    if (problem.empty() && blockLength < 0) {
        problem = "attribute block_length is " + std::to_string(blockLength) + ", it must be 0 (full attention) or more";
    } else if (problem.empty() && !(eps > 0.0F)) {
        problem = "attribute eps is " + std::to_string(eps) + ", it must be above 0";
    } else if (problem.empty() && (headNorm < 0 || headNorm > 1)) {
        problem = "attribute head_norm is " + std::to_string(headNorm) + ", it must be 0 or 1";
    }
    if (!problem.empty()) {
        logError(std::string(name) + ": " + problem + ".");
        return nullptr;
    }
    return new SelfAttentionPlugin(blockLength, eps, headNorm == 1);
}

IPluginV3* SelfAttentionPlugin::clone() noexcept
{
    return new (std::nothrow) SelfAttentionPlugin(mBlockLength, mEps, mHeadNorm);
}

int32_t SelfAttentionPlugin::getOutputDataTypes(DataType* outputs, int32_t nbOutputs, DataType const* inputs,
    int32_t nbInputs) const noexcept
{
    if (nbOutputs != 3 || nbInputs != inputCount()) {
        return refuse(std::to_string(nbInputs) + " inputs where head_norm asks for " + std::to_string(inputCount()));
    }
    outputs[0] = outputs[1] = outputs[2] = inputs[kQkv];
    return 0;
}

int32_t SelfAttentionPlugin::getOutputShapes(DimsExprs const* inputs, int32_t nbInputs, DimsExprs const*, int32_t,
    DimsExprs* outputs, int32_t nbOutputs, IExprBuilder& builder) noexcept
{
    if (nbInputs != inputCount() || nbOutputs != 3 || inputs[kQkv].nbDims != 2 || inputs[kPositions].nbDims != 2
        || inputs[kPastKey].nbDims != 4) {
        return -1;
    }
    auto const product = [&](IDimensionExpr const& a, IDimensionExpr const& b) {
        return builder.operation(DimensionOperation::kPROD, a, b);
    };
    auto const* const past = inputs[kPastKey].d;
    outputs[0] = inputs[kQkv]; // all heads' width less that of keys and values
    outputs[0].d[1] = builder.operation(DimensionOperation::kSUB, *inputs[kQkv].d[1],
        *product(*builder.constant(2), *product(*past[1], *past[3])));
    outputs[1] = inputs[kPastKey];
    outputs[1].d[2] = inputs[kPositions].d[1];
    outputs[2] = outputs[1];
    return 0;
}

bool SelfAttentionPlugin::supportsFormatCombination(int32_t position, DynamicPluginTensorDesc const* inOut,
    int32_t nbInputs, int32_t nbOutputs) noexcept
{
    if (nbInputs != inputCount() || nbOutputs != 3) {
        return false;
    }
    auto const& tensor = inOut[position].desc;
    switch (position) {
    case kQkv: return linear(tensor, DataType::kHALF) || linear(tensor, DataType::kBF16);
    case kCos:
    case kSin: return linear(tensor, DataType::kFLOAT);
    case kPositions:
    case kPastPositions: return linear(tensor, DataType::kINT64);
    default: return linear(tensor, inOut[kQkv].desc.type);
    }
}

DmoeSelfAttentionShape SelfAttentionPlugin::shapeOf(Dims const* const* inputs, DataType type) const
{
    auto const size = [&](Input input, int32_t axis) { return static_cast<int32_t>(inputs[input]->d[axis]); };
    DmoeSelfAttentionShape shape{};
    shape.rows = size(kPositions, 0);
    shape.tokens = size(kPositions, 1);
    shape.past = size(kPastKey, 2);
    shape.kv_heads = size(kPastKey, 1);
    shape.head_dim = size(kPastKey, 3);
    shape.heads = shape.head_dim > 0 ? size(kQkv, 1) / shape.head_dim - 2 * shape.kv_heads : 0;
    shape.rotary_dim = 2 * size(kCos, 3);
    shape.block_length = mBlockLength;
    shape.type = type == DataType::kBF16 ? DMOE_TYPE_BF16 : DMOE_TYPE_FP16;
    shape.eps = mEps;
    return shape;
}

std::string SelfAttentionPlugin::complaint(Dims const* const* inputs, bool running) const
{
    if (inputs[kQkv]->nbDims != 2 || inputs[kPositions]->nbDims != 2 || inputs[kPastKey]->nbDims != 4
        || inputs[kCos]->nbDims != 4) {
        return "qkv and position_ids must have two axes, past_key and cos four";
    }
    std::string found;
    auto const expect = [&](Input index, char const* what, Dims const& wanted) {
        Dims const& have = *inputs[index];
        bool same = have.nbDims == wanted.nbDims;
        for (int32_t i = 0; same && i < wanted.nbDims; ++i) {
            same = wanted.d[i] == have.d[i];
        }
        if (!same && found.empty()) {
            found = std::string(what) + " has shape " + text(have) + " where " + text(wanted) + " is needed";
        }
    };
    auto const& past = inputs[kPastKey]->d;
    int64_t const rows = inputs[kPositions]->d[0], tokens = inputs[kPositions]->d[1], width = inputs[kQkv]->d[1];
    if (past[3] < 1 || width % past[3] != 0) {
        return "qkv has rows of " + std::to_string(width) + " where a multiple of the head dimension "
            + std::to_string(past[3]) + " is needed";
    }
    if (running) {
        expect(kQkv, "qkv", Dims{2, {rows * tokens, width}});
    }
    expect(kCos, "cos", Dims{4, {rows, tokens, 1, inputs[kCos]->d[3]}});
    expect(kSin, "sin", *inputs[kCos]);
    expect(kPastPositions, "past_positions", Dims{2, {rows, past[2]}});
    expect(kPastKey, "past_key", Dims{4, {rows, past[1], past[2], past[3]}});
    expect(kPastValue, "past_value", *inputs[kPastKey]);
    if (mHeadNorm) {
        expect(kQueryNorm, "q_norm", Dims{1, {past[3]}});
        expect(kKeyNorm, "k_norm", Dims{1, {past[3]}});
    }
    return found;
}

int32_t SelfAttentionPlugin::configurePlugin(DynamicPluginTensorDesc const* inputs, int32_t nbInputs,
    DynamicPluginTensorDesc const*, int32_t) noexcept
{
    if (nbInputs != inputCount()) {
        return DMOE_ERROR_SHAPE;
    }
    InputDims const dims(inputs, nbInputs, mostOf);
    std::string const problem = complaint(dims.all, false);
    if (!problem.empty()) {
        return refuse(problem);
    }
    auto const shape = shapeOf(dims.all, inputs[kQkv].desc.type);
    int64_t const bytes = dmoe_self_attention_workspace_bytes(&shape);
    return bytes < 0 ? refuse(dmoe_error_string(static_cast<int32_t>(bytes))) : 0;
}

size_t SelfAttentionPlugin::getWorkspaceSize(DynamicPluginTensorDesc const* inputs, int32_t nbInputs,
    DynamicPluginTensorDesc const*, int32_t) const noexcept
{
    auto const shape = shapeOf(InputDims(inputs, nbInputs, mostOf).all, inputs[kQkv].desc.type);
    int64_t const bytes = dmoe_self_attention_workspace_bytes(&shape);
    return bytes < 0 ? 0 : roomForWorkspace(bytes); // enqueue refuses a shape that is too large for the kernels
}

int32_t SelfAttentionPlugin::enqueue(PluginTensorDesc const* inputDesc, PluginTensorDesc const*,
    void const* const* inputs, void* const* outputs, void* workspace, cudaStream_t stream) noexcept
{
    InputDims const dims(inputDesc, inputCount(), dimsOf);
    std::string const problem = complaint(dims.all, true);
    if (!problem.empty()) {
        return refuse(problem);
    }
    auto const shape = shapeOf(dims.all, inputDesc[kQkv].type);
    int32_t const status = dmoe_self_attention(&shape, inputs[kQkv], static_cast<float const*>(inputs[kCos]),
        static_cast<float const*>(inputs[kSin]), static_cast<int64_t const*>(inputs[kPositions]),
        static_cast<int64_t const*>(inputs[kPastPositions]), inputs[kPastKey], inputs[kPastValue],
        mHeadNorm ? inputs[kQueryNorm] : nullptr, mHeadNorm ? inputs[kKeyNorm] : nullptr, outputs[0], outputs[1],
        outputs[2], alignedWorkspace(workspace), stream);
    if (status != 0) {
        refuse(dmoe_error_string(status));
    }
    return status;
}

PluginFieldCollection const* SelfAttentionPlugin::getFieldsToSerialize() noexcept
{
    mFields = Fields();
    mFields.add(kBlockLength, mBlockLength);
    mFields.add(kEps, mEps);
    mFields.add(kHeadNorm, static_cast<int32_t>(mHeadNorm));
    mFields.add(kBuildField, std::string(dmoe_build_id()));
    return mFields.collection();
}

} // namespace dmoe
