"""gpu_generate.py and gpu_profile.py on ONNX Runtime's real CUDA provider over stubs (tests/cuda_stubs/).

    python tests/gpu/generate_on_stubs.py BUNDLE FOLDER

In the environment of cuda_stubs/prepare.py. Kernels do nothing there: what is shown is that the programs' way through
the real provider works, and what they write down, not times.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(_ROOT / "benchmarks"))

import gpu_generate  # noqa: E402
import gpu_profile  # noqa: E402
from stub_cuda import StubDevice  # type: ignore[import-not-found]  # noqa: E402

from dmoe_export.bundle.reader import open_bundle  # noqa: E402
from dmoe_export.runtime.gpu import custom_ops as ort_custom_ops  # noqa: E402
from dmoe_export.runtime.gpu.onnxruntime import open_onnxruntime_cuda  # noqa: E402


def main() -> None:
    """See the module."""
    folder, out = map(Path, sys.argv[1:])
    ort_custom_ops.INSTALLED = Path(os.environ["DMOE_CUDA_STUBS_OPS"])
    bundle, device = open_bundle(folder, "sizes"), StubDevice()
    gpu_generate.random_bundle = lambda *_: (bundle, {"reused": True})
    gpu_generate.build = lambda *_: gpu_generate._again(NotImplementedError("no TensorRT on stubs"))
    options = argparse.Namespace(geometry="sample", layers=4, precision="fp16", prompt=64, blocks=2, steps=4, profile=0,
                                 cpu=False, salient=0)
    result = {"benchmark": "gpu_generate", "date": "2030-01-01", "device": {"name": "stubs"}, "runs": []}
    gpu_generate.run(out, options, device, lambda entry: gpu_generate.add_entry(result, out, entry))
    backend = open_onnxruntime_cuda(bundle, device, cuda_graphs=False, custom_ops="on", profile=out / "profile")
    found = gpu_profile.profile(bundle, backend, 3, gpu_generate.coreset_settings(bundle, "15"))
    (out / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
