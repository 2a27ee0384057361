// How TensorRT finds the plugins: getCreators for registry.load_library, a constructor for plain dlopen.
#include "add_norm/plugin.h"
#include "block_route/plugin.h"
#include "experts/plugin.h"
#include "head/plugin.h"
#include "mixture/plugin.h"
#include "router/plugin.h"
#include "self_attention/plugin.h"

#include <NvInferVersion.h>
#include <dlfcn.h>

#include <mutex>
#include <string_view>
#include <vector>

namespace dmoe {

// TensorRT-RTX 1.7 (found out by calling it): its loggers are interfaces with a version, which those of TensorRT 10 are
// not, so that log() has another place in the table of functions. Not in the unnamed namespace: there the compiler sees
// that nobody implements it, and calls nothing.
class VersionedLogger : public nvinfer1::IVersionedInterface {
public:
    virtual void log(nvinfer1::ILogger::Severity severity, nvinfer1::AsciiChar const* message) noexcept = 0;
};

namespace {

nvinfer1::ILoggerFinder* gLoggerFinder{};
std::mutex gLoggerMutex;

template <class P>
nvinfer1::IPluginCreatorV3One* creator()
{
    static Creator<P> one;
    return &one;
}

// One of each plugin.
nvinfer1::IPluginCreatorV3One* (*const kCreators[])() = {
    creator<AddNormPlugin>,
    creator<BlockRoutePlugin>,
    creator<ExpertsPlugin>,
    creator<HeadPlugin>,
    creator<MixturePlugin>,
    creator<RouterPlugin>,
    creator<SelfAttentionPlugin>,
};

constexpr int32_t kRtxMajor = 1;

// A function of the TensorRT in this process; null where there is none. Python loads TensorRT-RTX for itself alone.
template <class Function>
Function* ofTensorRT(char const* name)
{
    void* found = dlsym(RTLD_DEFAULT, name);
    if (found == nullptr) {
        void* const rtx = dlopen("libtensorrt_rtx.so.1", RTLD_LAZY | RTLD_NOLOAD);
        found = rtx ? dlsym(rtx, name) : nullptr;
    }
    return reinterpret_cast<Function*>(found);
}

// Major version of the TensorRT in this process; 0 where there is none.
int32_t runningMajor()
{
    auto* const major = ofTensorRT<int32_t()>("getInferLibMajorVersion");
    return major ? major() : 0;
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
    auto* const registry = ofTensorRT<nvinfer1::IPluginRegistry*()>("getPluginRegistry");
    if (registry == nullptr || runningMajor() != NV_TENSORRT_MAJOR) {
        return;
    }
    for (auto* const make : kCreators) {
        registry()->registerCreator(*make(), kNamespace);
    }
}

} // namespace

void logError(std::string const& message) noexcept
{
    std::lock_guard<std::mutex> const lock(gLoggerMutex);
    auto* logger = gLoggerFinder ? gLoggerFinder->findLogger() : nullptr;
    if (logger == nullptr) { // a library that was loaded by hand may be told of none
        auto* const global = ofTensorRT<nvinfer1::ILogger*()>("getLogger");
        logger = global ? global() : nullptr;
    }
    int32_t const running = runningMajor();
    if (logger != nullptr && running == NV_TENSORRT_MAJOR) {
        logger->log(nvinfer1::ILogger::Severity::kERROR, message.c_str());
    } else if (logger != nullptr && running == kRtxMajor) {
        reinterpret_cast<VersionedLogger*>(logger)->log(nvinfer1::ILogger::Severity::kERROR, message.c_str());
    }
}

} // namespace dmoe

extern "C" __attribute__((visibility("default"))) void setLoggerFinder(nvinfer1::ILoggerFinder* finder)
{
    std::lock_guard<std::mutex> const lock(dmoe::gLoggerMutex);
    dmoe::gLoggerFinder = finder;
}

// So that whoever arranges quantised experts knows a library that reads them in another order.
extern "C" __attribute__((visibility("default"))) int32_t dmoe_experts_layout() { return dmoe::kFragments; }

extern "C" __attribute__((visibility("default"))) nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count)
{
    static std::vector<nvinfer1::IPluginCreatorInterface*> const creators = [] {
        std::vector<nvinfer1::IPluginCreatorInterface*> all;
        for (auto* const make : dmoe::kCreators) {
            all.push_back(make());
        }
        return all;
    }();
    count = static_cast<int32_t>(creators.size());
    return creators.data();
}
