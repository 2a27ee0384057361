// How TensorRT finds the plugins: getCreators for registry.load_library, a constructor for plain dlopen.
#include "block_route/plugin.h"
#include "experts/plugin.h"

#include <NvInferVersion.h>
#include <dlfcn.h>

#include <mutex>
#include <string_view>

namespace dmoe {
namespace {

nvinfer1::ILoggerFinder* gLoggerFinder{};
std::mutex gLoggerMutex;

Creator<BlockRoutePlugin>& routeCreator()
{
    static Creator<BlockRoutePlugin> creator;
    return creator;
}

Creator<ExpertsPlugin>& expertsCreator()
{
    static Creator<ExpertsPlugin> creator;
    return creator;
}

// TensorRT unpacks the copy inside an engine under a name of its own and asks getCreators itself.
bool loadedUnderOwnName()
{
    Dl_info info{};
    std::string_view const path = dladdr(&gLoggerFinder, &info) != 0 && info.dli_fname ? info.dli_fname : "";
    std::string_view const file = "libdmoe_plugins.so";
    return path.size() >= file.size() && path.substr(path.size() - file.size()) == file;
}

// Registration by dlopen alone. The registry's own class differs between TensorRT majors and TensorRT-RTX, so it is
// called only when the library in this process is the major that this file was compiled for; elsewhere
// registry.load_library(path) does the same through getCreators.
__attribute__((constructor)) void registerOnLoad()
{
    if (!loadedUnderOwnName()) {
        return;
    }
    auto const version = reinterpret_cast<int32_t (*)()>(dlsym(RTLD_DEFAULT, "getInferLibVersion"));
    auto const registry = reinterpret_cast<nvinfer1::IPluginRegistry* (*) ()>(dlsym(RTLD_DEFAULT, "getPluginRegistry"));
    if (version == nullptr || registry == nullptr || version() / 10000 != NV_TENSORRT_MAJOR) {
        return;
    }
    registry()->registerCreator(routeCreator(), kNamespace);
    registry()->registerCreator(expertsCreator(), kNamespace);
}

} // namespace

void logError(std::string const& message) noexcept
{
    std::lock_guard<std::mutex> const lock(gLoggerMutex);
    auto* logger = gLoggerFinder ? gLoggerFinder->findLogger() : nullptr;
    if (logger == nullptr) { // TensorRT-RTX 1.7 finds none for a library that is loaded by hand
        auto const global = reinterpret_cast<nvinfer1::ILogger* (*) ()>(dlsym(RTLD_DEFAULT, "getLogger"));
        logger = global ? global() : nullptr;
    }
    if (logger != nullptr) {
        logger->log(nvinfer1::ILogger::Severity::kERROR, message.c_str());
    }
}

} // namespace dmoe

extern "C" __attribute__((visibility("default"))) void setLoggerFinder(nvinfer1::ILoggerFinder* finder)
{
    std::lock_guard<std::mutex> const lock(dmoe::gLoggerMutex);
    dmoe::gLoggerFinder = finder;
}

extern "C" __attribute__((visibility("default"))) nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count)
{
    static nvinfer1::IPluginCreatorInterface* const creators[] = {&dmoe::routeCreator(), &dmoe::expertsCreator()};
    count = 2;
    return creators;
}
