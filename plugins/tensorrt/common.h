// What the plugins share: fields, logging, and the creator. Written for TensorRT 10.14 headers and later, and for
// TensorRT-RTX, whose plugin interfaces are the same classes.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <string>
#include <vector>

namespace dmoe {

constexpr char kNamespace[] = "dmoe";
constexpr char kVersion[] = "1";

// Tells the host's logger; silent where there is none.
void logError(std::string const& message) noexcept;

// A named value that travels from an ONNX attribute into the plugin and from there into the engine file.
class Fields {
public:
    void add(char const* name, int32_t value);
    void add(char const* name, float value);
    void add(char const* name, std::string const& value);

    // Valid as long as this object lives and is not added to.
    nvinfer1::PluginFieldCollection const* collection();

private:
    struct Entry {
        std::string name, text;
        int32_t integer{};
        float real{};
        nvinfer1::PluginFieldType type{};
    };
    std::vector<Entry> mEntries;
    std::vector<nvinfer1::PluginField> mFields;
    nvinfer1::PluginFieldCollection mCollection{};
};

// Reads the fields a plugin is created from; remembers the first one that is missing or of another type.
class FieldReader {
public:
    explicit FieldReader(nvinfer1::PluginFieldCollection const* collection) : mCollection(collection) {}

    int32_t integer(char const* name);
    float real(char const* name);
    std::string text(char const* name);
    bool has(char const* name) const;
    std::string const& problem() const { return mProblem; }

private:
    nvinfer1::PluginField const* find(char const* name, nvinfer1::PluginFieldType type);

    nvinfer1::PluginFieldCollection const* mCollection;
    std::string mProblem;
};

// An engine made with other kernels is refused by name: the field is written by every plugin of this library.
constexpr char kBuildField[] = "dmoe_build";
bool sameBuild(FieldReader& fields, nvinfer1::TensorRTPhase phase, char const* plugin) noexcept;

inline bool linear(nvinfer1::PluginTensorDesc const& tensor, nvinfer1::DataType type) noexcept
{
    return tensor.type == type && tensor.format == nvinfer1::PluginFormat::kLINEAR;
}

// Such as [32, 64].
std::string text(nvinfer1::Dims const& dims);

inline nvinfer1::Dims const& dimsOf(nvinfer1::PluginTensorDesc const& desc) { return desc.dims; }
inline nvinfer1::Dims const& mostOf(nvinfer1::DynamicPluginTensorDesc const& desc) { return desc.max; }

// The dimensions of inputs, wherever TensorRT keeps them: dimsOf when it runs, mostOf while it builds.
struct InputDims {
    template <class Desc, class Get>
    InputDims(Desc const* inputs, int32_t count, Get get)
    {
        for (int32_t i = 0; i < count && i < kMost; ++i) {
            all[i] = &get(inputs[i]);
        }
    }
    nvinfer1::Dims const& operator[](int32_t i) const { return *all[i]; }

    static constexpr int32_t kMost = 14; // a mixture with scales and pools has so many
    nvinfer1::Dims const* all[kMost]{};
};

// Parts of IPluginV3 that do not differ between our plugins.
class Plugin : public nvinfer1::IPluginV3,
               public nvinfer1::IPluginV3OneCore,
               public nvinfer1::IPluginV3OneBuild,
               public nvinfer1::IPluginV3OneRuntime {
public:
    nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept final;
    char const* getPluginVersion() const noexcept final { return kVersion; }
    char const* getPluginNamespace() const noexcept final { return kNamespace; }
    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept final { return clone(); }
    int32_t configurePlugin(nvinfer1::DynamicPluginTensorDesc const*, int32_t, nvinfer1::DynamicPluginTensorDesc const*,
        int32_t) noexcept override
    {
        return 0;
    }
    // Tells the host's logger half a sentence, after the plugin's name; DMOE_ERROR_SHAPE.
    int32_t refuse(std::string const& problem) const noexcept;
    int32_t onShapeChange(nvinfer1::PluginTensorDesc const*, int32_t, nvinfer1::PluginTensorDesc const*,
        int32_t) noexcept final
    {
        return 0;
    }
};

// `P` has: static constexpr name, fieldNames() and create(FieldReader&) → new plugin or null.
template <class P>
class Creator final : public nvinfer1::IPluginCreatorV3One {
public:
    Creator()
    {
        for (auto const& [name, type] : P::attributes) {
            mFields.emplace_back(name, nullptr, type, 1);
        }
        mFields.emplace_back(kBuildField, nullptr, nvinfer1::PluginFieldType::kCHAR, 1);
        mCollection.nbFields = static_cast<int32_t>(mFields.size());
        mCollection.fields = mFields.data();
    }

    nvinfer1::IPluginV3* createPlugin(char const*, nvinfer1::PluginFieldCollection const* collection,
        nvinfer1::TensorRTPhase phase) noexcept override
    {
        try {
            FieldReader fields(collection);
            return sameBuild(fields, phase, P::name) ? P::create(fields) : nullptr;
        } catch (std::exception const& error) {
            logError(std::string(P::name) + ": " + error.what());
            return nullptr;
        }
    }

    nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override { return &mCollection; }
    char const* getPluginName() const noexcept override { return P::name; }
    char const* getPluginVersion() const noexcept override { return kVersion; }
    char const* getPluginNamespace() const noexcept override { return kNamespace; }

private:
    std::vector<nvinfer1::PluginField> mFields;
    nvinfer1::PluginFieldCollection mCollection{};
};

} // namespace dmoe
