#include "plugin.h"

#include "../../kernels/workspace.h"

#include <algorithm>

using namespace nvinfer1;

namespace dmoe {
namespace {

enum Input { kHidden, kIds, kWeights, kGateUp, kDown };
constexpr char kResidency[] = "residency", kBits[] = "bits", kGroupSize[] = "group_size", kLayout[] = "layout",
               kActivation[] = "activation", kSilu[] = "silu", kGeluTanh[] = "gelu_tanh";

} // namespace

bool ExpertsPlugin::read(FieldReader& fields, char const* op, Form& form)
{
    int32_t const residency = fields.has(kResidency) ? fields.integer(kResidency) : 0;
    int32_t const bits = fields.has(kBits) ? fields.integer(kBits) : 16;
    int32_t const group = fields.has(kGroupSize) ? fields.integer(kGroupSize) : 0;
    int32_t const layout = fields.has(kLayout) ? fields.integer(kLayout) : 0;
    std::string const activation = fields.has(kActivation) ? fields.text(kActivation) : kSilu;
    std::string problem = fields.problem();
    if (problem.empty() && activation != kSilu && activation != kGeluTanh) {
        problem = "attribute activation is '" + activation + "', it must be 'silu' or 'gelu_tanh'";
    } else if (problem.empty() && (residency < 0 || residency > 1)) {
        problem = "attribute residency is " + std::to_string(residency) + ", it must be 0 or 1";
    } else if (problem.empty() && bits != 4 && bits != 8 && bits != 16) {
        problem = "attribute bits is " + std::to_string(bits) + ", it must be 4, 8 or 16";
    } else if (problem.empty() && (bits == 16 ? group != 0 : group != 32 && group != 64 && group != 128)) {
        problem = "attribute group_size is " + std::to_string(group) + ", it must be "
            + (bits == 16 ? "left out with weights of 16 bits" : "32, 64 or 128");
    } else if (problem.empty() && layout != (bits == 16 ? 0 : kFragments)) {
        problem = "attribute layout is " + (fields.has(kLayout) ? std::to_string(layout) : std::string("missing"))
            + ", it must be " + (bits == 16 ? "left out with weights of 16 bits" : "2 (integers in fragment order)");
    }
    if (!problem.empty()) {
        logError(std::string(op) + ": " + problem + ".");
        return false;
    }
    form = {residency == 1, bits, group, activation == kSilu ? DMOE_ACTIVATION_SILU : DMOE_ACTIVATION_GELU_TANH};
    return true;
}

ExpertsPlugin* ExpertsPlugin::create(FieldReader& fields)
{
    Form form{};
    return read(fields, name, form) ? new ExpertsPlugin(form) : nullptr;
}

IPluginV3* ExpertsPlugin::clone() noexcept
{
    return new (std::nothrow) ExpertsPlugin(mForm);
}

int32_t ExpertsPlugin::getOutputDataTypes(DataType* outputs, int32_t nbOutputs, DataType const* inputs,
    int32_t nbInputs) const noexcept
{
    if (nbOutputs != 1 || nbInputs != inputCount()) {
        logError(std::string(mName) + ": " + std::to_string(nbInputs) + " inputs where "
            + std::to_string(inputCount()) + " are needed.");
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
    switch (position) {
    case kHidden: return linear(tensor, DataType::kHALF) || linear(tensor, DataType::kBF16);
    case kIds: return linear(tensor, DataType::kINT32);
    case kWeights: return linear(tensor, DataType::kFLOAT);
    default: break;
    }
    if (mForm.residency && position == slotsAt()) {
        return linear(tensor, DataType::kINT32);
    }
    bool const pooled = mForm.residency && (position == slotsAt() + 1 || position == slotsAt() + 2);
    if (quantised() && (position == kGateUp || position == kDown || pooled)) {
        return linear(tensor, DataType::kINT8); // the bytes of unsigned integers: TensorRT gives a plugin no uint8
    }
    return linear(tensor, inOut[kHidden].desc.type); // other weights, scales, a shared expert, the output: as hidden
}

DmoeExpertsShape ExpertsPlugin::shapeOf(Dims const* const* inputs, DataType type) const
{
    DmoeExpertsShape shape{};
    shape.tokens = static_cast<int32_t>(inputs[kHidden]->d[0]);
    shape.places = static_cast<int32_t>(inputs[kIds]->d[1]);
    shape.experts = static_cast<int32_t>(inputs[kGateUp]->d[0]);
    shape.hidden = static_cast<int32_t>(inputs[kHidden]->d[1]);
    shape.width = static_cast<int32_t>(inputs[kGateUp]->d[1] / 2);
    shape.type = type == DataType::kBF16 ? DMOE_TYPE_BF16 : DMOE_TYPE_FP16;
    shape.activation = mForm.activation;
    return shape;
}

DmoeSharedExpert ExpertsPlugin::sharedOf(Dims const* const* inputs) const
{
    return {static_cast<int32_t>(inputs[sharedAt() + 1]->d[1]), nullptr, nullptr};
}

std::string ExpertsPlugin::complaint(Dims const* const* inputs) const
{
    std::string found;
    auto const expect = [&](int32_t index, char const* what, Dims const& wanted) {
        Dims const& have = *inputs[index];
        bool same = have.nbDims == wanted.nbDims;
        for (int32_t i = 0; same && i < wanted.nbDims; ++i) {
            same = wanted.d[i] == have.d[i];
        }
        if (!same && found.empty()) {
            found = std::string(what) + " has shape " + text(have) + " where " + text(wanted) + " is needed";
        }
    };
    auto const& hidden = *inputs[kHidden];
    auto const& gateUp = *inputs[kGateUp];
    if (hidden.nbDims != 2 || inputs[kIds]->nbDims != 2 || gateUp.nbDims != 3) {
        return "hidden and expert_ids must have two axes, gate_up three";
    }
    int64_t const experts = gateUp.d[0], rows = gateUp.d[1], size = hidden.d[1], width = rows / 2;
    int64_t const group = quantised() ? mForm.groupSize : 1;
    if (size % group != 0 || width % group != 0 || rows % 2 != 0) {
        return "the hidden size " + std::to_string(size) + " and the expert width " + std::to_string(width)
            + " must be whole groups of " + std::to_string(group);
    }
    int64_t const shift = quantised() ? mForm.bits : 8; // weights of 16 bits are counted, the others are bytes
    expect(kWeights, "expert_weights", Dims{2, {hidden.d[0], inputs[kIds]->d[1]}});
    expect(kGateUp, "gate_up", Dims{3, {experts, rows, size * shift / 8}});
    expect(kDown, "down", Dims{3, {experts, size, width * shift / 8}});
    if (quantised()) {
        expect(scalesAt(), "gate_up_scales", Dims{3, {experts, rows, size / group}});
        expect(scalesAt() + 1, "down_scales", Dims{3, {experts, size, width / group}});
    }
    if (mShared) {
        int64_t const sharedWidth = inputs[sharedAt() + 1]->nbDims == 2 ? inputs[sharedAt() + 1]->d[1] : 0;
        expect(sharedAt() + 1, "shared_down", Dims{2, {size, sharedWidth}});
        expect(sharedAt(), "shared_gate_up", Dims{2, {2 * sharedWidth, size}});
    }
    if (mForm.residency) {
        int64_t const slots = inputs[slotsAt() + 1]->d[0];
        expect(slotsAt(), "slot_of_expert", Dims{1, {experts}});
        expect(slotsAt() + 1, "gate_up_pool", Dims{3, {slots, rows, size * shift / 8}});
        expect(slotsAt() + 2, "down_pool", Dims{3, {slots, size, width * shift / 8}});
        if (quantised()) {
            expect(slotsAt() + 3, "gate_up_scales_pool", Dims{3, {slots, rows, size / group}});
            expect(slotsAt() + 4, "down_scales_pool", Dims{3, {slots, size, width / group}});
        }
    }
    return found;
}

int32_t ExpertsPlugin::configurePlugin(DynamicPluginTensorDesc const* inputs, int32_t nbInputs,
    DynamicPluginTensorDesc const*, int32_t) noexcept
{
    if (nbInputs != inputCount()) {
        return DMOE_ERROR_SHAPE;
    }
    std::string problem = complaint(InputDims(inputs, nbInputs, mostOf).all);
    int64_t const bytes = problem.empty() ? workspaceOf(inputs) : 0;
    problem = bytes < 0 ? dmoe_error_string(static_cast<int32_t>(bytes)) : problem;
    if (!problem.empty()) {
        logError(std::string(mName) + ": " + problem + ".");
        return DMOE_ERROR_SHAPE;
    }
    return 0;
}

int64_t ExpertsPlugin::workspaceOf(DynamicPluginTensorDesc const* inputs) const
{
    InputDims const dims(inputs, inputCount(), mostOf);
    auto const shape = shapeOf(dims.all, inputs[kHidden].desc.type);
    auto const shared = mShared ? sharedOf(dims.all) : DmoeSharedExpert{};
    return dmoe_mixture_workspace_bytes(&shape, mShared ? &shared : nullptr);
}

size_t ExpertsPlugin::getWorkspaceSize(DynamicPluginTensorDesc const* inputs, int32_t, DynamicPluginTensorDesc const*,
    int32_t) const noexcept
{
    return roomForWorkspace(std::max<int64_t>(workspaceOf(inputs), 0)); // what is out of range was refused before
}

int32_t ExpertsPlugin::enqueue(PluginTensorDesc const* inputDesc, PluginTensorDesc const*, void const* const* inputs,
    void* const* outputs, void* workspace, cudaStream_t stream) noexcept
{
    InputDims const dims(inputDesc, inputCount(), dimsOf);
    std::string const problem = complaint(dims.all);
    if (!problem.empty()) {
        logError(std::string(mName) + ": " + problem + ".");
        return DMOE_ERROR_SHAPE;
    }
    auto const shape = shapeOf(dims.all, inputDesc[kHidden].type);
    DmoeExpertPool pool{};
    DmoeQuantisation quantisation{mForm.bits, mForm.groupSize, nullptr, nullptr, nullptr, nullptr};
    if (quantised()) {
        quantisation.gate_up_scales = inputs[scalesAt()];
        quantisation.down_scales = inputs[scalesAt() + 1];
    }
    if (mForm.residency) {
        pool = {static_cast<int32_t>(dims.all[slotsAt() + 1]->d[0]), static_cast<int32_t const*>(inputs[slotsAt()]),
            inputs[slotsAt() + 1], inputs[slotsAt() + 2]};
    }
    if (quantised() && mForm.residency) {
        quantisation.gate_up_pool_scales = inputs[slotsAt() + 3];
        quantisation.down_pool_scales = inputs[slotsAt() + 4];
    }
    DmoeSharedExpert shared{};
    if (mShared) {
        shared = {sharedOf(dims.all).width, inputs[sharedAt()], inputs[sharedAt() + 1]};
    }
    int32_t const status = dmoe_mixture(&shape, mShared ? &shared : nullptr, quantised() ? &quantisation : nullptr,
        mForm.residency ? &pool : nullptr, inputs[kHidden], static_cast<int32_t const*>(inputs[kIds]),
        static_cast<float const*>(inputs[kWeights]), inputs[kGateUp], inputs[kDown], outputs[0],
        alignedWorkspace(workspace), stream);
    if (status != 0) {
        logError(std::string(mName) + ": " + dmoe_error_string(status) + ".");
    }
    return status;
}

PluginFieldCollection const* ExpertsPlugin::getFieldsToSerialize() noexcept
{
    mFields = Fields();
    if (mForm.residency) {
        mFields.add(kResidency, int32_t{1});
    }
    if (quantised()) {
        mFields.add(kBits, mForm.bits);
        mFields.add(kGroupSize, mForm.groupSize);
        mFields.add(kLayout, kFragments);
    }
    if (mForm.activation != DMOE_ACTIVATION_SILU) {
        mFields.add(kActivation, std::string(kGeluTanh));
    }
    mFields.add(kBuildField, std::string(dmoe_build_id()));
    return mFields.collection();
}

} // namespace dmoe
