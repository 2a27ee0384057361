#include "common.h"

#include "../kernels/dmoe_kernels.h"

#include <cstring>

using namespace nvinfer1;

namespace dmoe {

void Fields::add(char const* name, int32_t value)
{
    mEntries.push_back({name, {}, value, 0.0F, PluginFieldType::kINT32});
}

void Fields::add(char const* name, float value)
{
    mEntries.push_back({name, {}, 0, value, PluginFieldType::kFLOAT32});
}

void Fields::add(char const* name, std::string const& value)
{
    mEntries.push_back({name, value, 0, 0.0F, PluginFieldType::kCHAR});
}

PluginFieldCollection const* Fields::collection()
{
    mFields.clear();
    for (auto const& entry : mEntries) {
        bool const isText = entry.type == PluginFieldType::kCHAR;
        void const* data = isText ? static_cast<void const*>(entry.text.data())
            : entry.type == PluginFieldType::kINT32 ? static_cast<void const*>(&entry.integer)
                                                    : static_cast<void const*>(&entry.real);
        mFields.emplace_back(entry.name.c_str(), data, entry.type, isText ? static_cast<int32_t>(entry.text.size()) : 1);
    }
    mCollection.nbFields = static_cast<int32_t>(mFields.size());
    mCollection.fields = mFields.data();
    return &mCollection;
}

bool FieldReader::has(char const* name) const
{
    for (int32_t i = 0; i < mCollection->nbFields; ++i) {
        if (std::strcmp(mCollection->fields[i].name, name) == 0) {
            return true;
        }
    }
    return false;
}

PluginField const* FieldReader::find(char const* name, PluginFieldType type)
{
    for (int32_t i = 0; i < mCollection->nbFields; ++i) {
        auto const& field = mCollection->fields[i];
        if (std::strcmp(field.name, name) != 0) {
            continue;
        }
        if (field.type == type && field.data != nullptr) {
            return &field;
        }
        break;
    }
    if (mProblem.empty()) {
        mProblem = std::string("attribute ") + name + " is missing or has another type";
    }
    return nullptr;
}

int32_t FieldReader::integer(char const* name)
{
    auto const* field = find(name, PluginFieldType::kINT32);
    return field ? *static_cast<int32_t const*>(field->data) : 0;
}

float FieldReader::real(char const* name)
{
    auto const* field = find(name, PluginFieldType::kFLOAT32);
    return field ? *static_cast<float const*>(field->data) : 0.0F;
}

std::string FieldReader::text(char const* name)
{
    auto const* field = find(name, PluginFieldType::kCHAR);
    if (field == nullptr) {
        return {};
    }
    std::string value(static_cast<char const*>(field->data), static_cast<size_t>(field->length));
    return value.c_str(); // a parser may count the terminating zero
}

bool sameBuild(FieldReader& fields, TensorRTPhase phase, char const* plugin) noexcept
{
    if (phase != TensorRTPhase::kRUNTIME) {
        return true; // an ONNX node does not name a build
    }
    std::string const built = fields.text(kBuildField);
    if (built == dmoe_build_id()) {
        return true;
    }
    logError(std::string(plugin) + ": the engine was made with plugin build " + built + ", the loaded library is build "
        + dmoe_build_id() + "; load that build, or build the engine again.");
    return false;
}

std::string text(Dims const& dims)
{
    std::string all;
    for (int32_t i = 0; i < dims.nbDims; ++i) {
        all += (i ? ", " : "") + std::to_string(dims.d[i]);
    }
    return "[" + all + "]";
}

int32_t Plugin::refuse(std::string const& problem) const noexcept
{
    logError(std::string(getPluginName()) + ": " + problem + ".");
    return DMOE_ERROR_SHAPE;
}

IPluginCapability* Plugin::getCapabilityInterface(PluginCapabilityType type) noexcept
{
    switch (type) {
    case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
    case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild*>(this);
    case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
    }
    return nullptr;
}

} // namespace dmoe
