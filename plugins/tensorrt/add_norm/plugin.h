// DmoeAddNorm as an IPluginV3; README.md beside this says what goes in and out.
#pragma once

#include "../../kernels/dmoe_kernels.h"
#include "../common.h"

#include <array>
#include <utility>

namespace dmoe {

class AddNormPlugin final : public Plugin {
public:
    static constexpr char name[] = "DmoeAddNorm";
    static constexpr std::array<std::pair<char const*, nvinfer1::PluginFieldType>, 1> attributes{{
        {"eps", nvinfer1::PluginFieldType::kFLOAT32},
    }};

    static AddNormPlugin* create(FieldReader& fields);
    explicit AddNormPlugin(float eps) : mEps(eps) {}

    nvinfer1::IPluginV3* clone() noexcept override;
    char const* getPluginName() const noexcept override { return name; }
    int32_t getNbOutputs() const noexcept override { return 2; }
    int32_t getOutputDataTypes(nvinfer1::DataType* outputs, int32_t nbOutputs, nvinfer1::DataType const* inputs,
        int32_t nbInputs) const noexcept override;
    int32_t getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t nbInputs, nvinfer1::DimsExprs const* shapeInputs,
        int32_t nbShapeInputs, nvinfer1::DimsExprs* outputs, int32_t nbOutputs,
        nvinfer1::IExprBuilder& builder) noexcept override;
    bool supportsFormatCombination(int32_t position, nvinfer1::DynamicPluginTensorDesc const* inOut, int32_t nbInputs,
        int32_t nbOutputs) noexcept override;
    int32_t configurePlugin(nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t nbInputs,
        nvinfer1::DynamicPluginTensorDesc const* outputs, int32_t nbOutputs) noexcept override;
    int32_t enqueue(nvinfer1::PluginTensorDesc const* inputDesc, nvinfer1::PluginTensorDesc const* outputDesc,
        void const* const* inputs, void* const* outputs, void* workspace, cudaStream_t stream) noexcept override;
    nvinfer1::PluginFieldCollection const* getFieldsToSerialize() noexcept override;

private:
    float mEps;
    Fields mFields;
};

} // namespace dmoe
