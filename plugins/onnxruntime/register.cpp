// The one symbol ONNX Runtime looks for.
#include "common.h"

namespace {

constexpr char kSession[] = "dmoe.session";

// Never released: at the end of the process ONNX Runtime may be gone before us.
OrtCustomOpDomain* makeDomain(DmoeSession* session)
{
    Ort::CustomOpDomain made("dmoe");
    dmoe::addOps(made, session);
    return made.release();
}

} // namespace

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
    OrtApiBase const* base)
{
    OrtApi const* const api = base->GetApi(ORT_API_VERSION);
    if (api == nullptr) {
        // Version 1 is in every ONNX Runtime.
        return base->GetApi(1)->CreateStatus(ORT_NOT_IMPLEMENTED,
            (std::string("libdmoe_onnxruntime.so was built for API version ") + std::to_string(ORT_API_VERSION)
                + " of ONNX Runtime, newer than version " + base->GetVersionString()
                + " has; upgrade with: pip install -U onnxruntime-gpu.").c_str());
    }
    Ort::InitApi(api);
    return dmoe::guarded("RegisterCustomOps", [&] {
        Ort::UnownedSessionOptions to(options);
        // Sessions that name none of ours share a domain.
        static OrtCustomOpDomain* const shared = makeDomain(nullptr);
        to.Add(to.HasConfigEntry(kSession) ? makeDomain(dmoe::sessionAt(to.GetConfigEntry(kSession).c_str())) : shared);
    });
}
