// DmoeExperts as an IPluginV3; README.md beside this says what goes in and out. DmoeMixture is the same with the shared
// expert's weights as two more inputs (../mixture).
#pragma once

#include "../../kernels/dmoe_kernels.h"
#include "../common.h"

#include <array>
#include <string>
#include <utility>

namespace dmoe {

constexpr int32_t kFragments = 2; // attribute layout: the one order in which the kernels read integers

class ExpertsPlugin : public Plugin {
public:
    static constexpr char name[] = "DmoeExperts";
    static constexpr std::array<std::pair<char const*, nvinfer1::PluginFieldType>, 5> attributes{{
        {"residency", nvinfer1::PluginFieldType::kINT32},
        {"bits", nvinfer1::PluginFieldType::kINT32},
        {"group_size", nvinfer1::PluginFieldType::kINT32},
        {"layout", nvinfer1::PluginFieldType::kINT32},
        {"activation", nvinfer1::PluginFieldType::kCHAR},
    }};

    // What the attributes say. `residency`: there are further inputs, the table and the pool of resident experts. `bits` of a
    // weight: 16, or 8 or 4 with a scale per `groupSize` of them as further inputs. `activation`: DMOE_ACTIVATION_*.
    struct Form {
        bool residency;
        int32_t bits, groupSize, activation;
    };

    explicit ExpertsPlugin(Form const& form) : ExpertsPlugin(form, name, false) {}

    // Null where the fields make no sense, and the logger knows why.
    static ExpertsPlugin* create(FieldReader& fields);

    nvinfer1::IPluginV3* clone() noexcept override;
    char const* getPluginName() const noexcept final { return mName; }
    int32_t getNbOutputs() const noexcept override { return 1; }
    int32_t getOutputDataTypes(nvinfer1::DataType* outputs, int32_t nbOutputs, nvinfer1::DataType const* inputs,
        int32_t nbInputs) const noexcept override;
    int32_t getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t nbInputs, nvinfer1::DimsExprs const* shapeInputs,
        int32_t nbShapeInputs, nvinfer1::DimsExprs* outputs, int32_t nbOutputs,
        nvinfer1::IExprBuilder& builder) noexcept override;
    bool supportsFormatCombination(int32_t position, nvinfer1::DynamicPluginTensorDesc const* inOut, int32_t nbInputs,
        int32_t nbOutputs) noexcept override;
    int32_t configurePlugin(nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t nbInputs,
        nvinfer1::DynamicPluginTensorDesc const* outputs, int32_t nbOutputs) noexcept override;
    size_t getWorkspaceSize(nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t nbInputs,
        nvinfer1::DynamicPluginTensorDesc const* outputs, int32_t nbOutputs) const noexcept override;
    int32_t enqueue(nvinfer1::PluginTensorDesc const* inputDesc, nvinfer1::PluginTensorDesc const* outputDesc,
        void const* const* inputs, void* const* outputs, void* workspace, cudaStream_t stream) noexcept override;
    nvinfer1::PluginFieldCollection const* getFieldsToSerialize() noexcept override;

protected:
    // `shared`: the shared expert's weights are further inputs.
    ExpertsPlugin(Form const& form, char const* op, bool shared) : mForm(form), mName(op), mShared(shared) {}

    // For the op of this name; true and `form`, or false.
    static bool read(FieldReader& fields, char const* op, Form& form);

    Form const& form() const noexcept { return mForm; }

private:
    // Where inputs are that not every form has; only what is there may be asked for.
    int32_t scalesAt() const noexcept { return 5; }
    int32_t sharedAt() const noexcept { return quantised() ? 7 : 5; }
    int32_t slotsAt() const noexcept { return sharedAt() + (mShared ? 2 : 0); }
    int32_t inputCount() const noexcept { return slotsAt() + (mForm.residency ? quantised() ? 5 : 3 : 0); }
    bool quantised() const noexcept { return mForm.bits != 16; }

    // The kernel's shapes from the inputs' dimensions, and one sentence about the first input that does not fit.
    DmoeExpertsShape shapeOf(nvinfer1::Dims const* const* inputs, nvinfer1::DataType type) const;
    DmoeSharedExpert sharedOf(nvinfer1::Dims const* const* inputs) const; // without addresses
    std::string complaint(nvinfer1::Dims const* const* inputs) const;
    int64_t workspaceOf(nvinfer1::DynamicPluginTensorDesc const* inputs) const; // of the largest run, or DMOE_ERROR_*

    Form mForm;
    char const* mName;
    bool mShared;
    Fields mFields;
};

} // namespace dmoe
