// Asks the built plugin library, as TensorRT would, for the experts' workspace, and hands it one that starts anywhere.
// Prints: bytes the kernels need, bytes the plugin asks for, what the kernels say of a workspace that is not aligned,
// then what enqueue() returns for each start.
#include <NvInferRuntime.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>

#include "dmoe_kernels.h"

using namespace nvinfer1;

int main(int, char** argv)
{
    void* const library = dlopen(argv[1], RTLD_NOW);
    if (library == nullptr) {
        std::fprintf(stderr, "%s\n", dlerror());
        return 1;
    }
    using GetCreators = IPluginCreatorInterface* const* (*)(int32_t&);
    auto* const creators = reinterpret_cast<GetCreators>(dlsym(library, "getCreators"));
    auto* const needed = reinterpret_cast<decltype(&dmoe_experts_workspace_bytes)>(
        dlsym(library, "dmoe_experts_workspace_bytes"));
    int32_t count = 0;
    IPluginCreatorInterface* const* const all = creators(count);
    IPluginCreatorV3One* creator = nullptr;
    for (int32_t i = 0; i < count; ++i) {
        auto* const one = static_cast<IPluginCreatorV3One*>(all[i]);
        creator = std::strcmp(one->getPluginName(), "DmoeExperts") == 0 ? one : creator;
    }
    PluginFieldCollection const none{0, nullptr};
    auto* const plugin = creator->createPlugin("experts", &none, TensorRTPhase::kBUILD);
    auto* const build = static_cast<IPluginV3OneBuild*>(plugin->getCapabilityInterface(PluginCapabilityType::kBUILD));
    auto* const run = static_cast<IPluginV3OneRuntime*>(plugin->getCapabilityInterface(PluginCapabilityType::kRUNTIME));

    DmoeExpertsShape const shape{32, 8, 256, 64, 32, DMOE_TYPE_FP16};
    Dims const dims[] = {{2, {32, 64}}, {2, {32, 8}}, {2, {32, 8}}, {3, {256, 64, 64}}, {3, {256, 64, 32}}};
    DataType const types[] = {DataType::kHALF, DataType::kINT32, DataType::kFLOAT, DataType::kHALF, DataType::kHALF};
    PluginTensorDesc descriptions[5]{}, output{};
    DynamicPluginTensorDesc ranges[5]{}, outputRange{};
    for (int i = 0; i < 5; ++i) {
        descriptions[i].dims = dims[i], descriptions[i].type = types[i];
        ranges[i] = {descriptions[i], dims[i], dims[i], dims[i]};
    }
    void* const tensor = std::aligned_alloc(256, 1 << 20);
    auto* const kernels = reinterpret_cast<decltype(&dmoe_experts)>(dlsym(library, "dmoe_experts"));
    int const refused = kernels(&shape, tensor, static_cast<int32_t*>(tensor), static_cast<float*>(tensor), tensor,
        tensor, tensor, static_cast<char*>(tensor) + 16, nullptr);
    size_t const asked = build->getWorkspaceSize(ranges, 5, &outputRange, 1);
    std::printf("%lld %zu %d ", static_cast<long long>(needed(&shape)), asked, refused);
    void const* const inputs[] = {tensor, tensor, tensor, tensor, tensor};
    void* const outputs[] = {tensor};
    for (int start = 0; start < 256; start += 16) {
        void* const workspace = static_cast<char*>(tensor) + start;
        std::printf("%d ", run->enqueue(descriptions, &output, inputs, outputs, workspace, nullptr));
    }
    return 0;
}
