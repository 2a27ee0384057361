// DmoeSelfAttention as an IPluginV3; README.md beside this says what goes in and out.
#pragma once

#include "../../kernels/dmoe_kernels.h"
#include "../common.h"

#include <array>
#include <string>
#include <utility>

namespace dmoe {

class SelfAttentionPlugin final : public Plugin {
public:
    static constexpr char name[] = "DmoeSelfAttention";
    static constexpr std::array<std::pair<char const*, nvinfer1::PluginFieldType>, 3> attributes{{
        {"block_length", nvinfer1::PluginFieldType::kINT32},
        {"eps", nvinfer1::PluginFieldType::kFLOAT32},
        {"head_norm", nvinfer1::PluginFieldType::kINT32},
    }};

    static SelfAttentionPlugin* create(FieldReader& fields);
    // `headNorm`: there are two more inputs, the norms of query and key heads.
    SelfAttentionPlugin(int32_t blockLength, float eps, bool headNorm);

    nvinfer1::IPluginV3* clone() noexcept override;
    char const* getPluginName() const noexcept override { return name; }
    int32_t getNbOutputs() const noexcept override { return 3; }
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

private:
    int32_t inputCount() const noexcept { return mHeadNorm ? 9 : 7; }

    // The kernel's shape from the inputs' dimensions, and one sentence about the first input that does not fit. `running`:
    // qkv has the rows of this run, not the most that a profile allows.
    DmoeSelfAttentionShape shapeOf(nvinfer1::Dims const* const* inputs, nvinfer1::DataType type) const;
    std::string complaint(nvinfer1::Dims const* const* inputs, bool running) const;

    int32_t mBlockLength;
    float mEps;
    bool mHeadNorm;
    Fields mFields;
};

} // namespace dmoe
