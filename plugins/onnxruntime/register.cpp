// The one symbol ONNX Runtime looks for.
#include "common.h"

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
        // Never released: sessions share it, and at the end of the process ONNX Runtime may be gone before us.
        static OrtCustomOpDomain* const domain = [] {
            Ort::CustomOpDomain made("dmoe");
            dmoe::addBlockRoute(made);
            dmoe::addExperts(made);
            return made.release();
        }();
        Ort::UnownedSessionOptions(options).Add(domain);
    });
}
