"""Add what is compiled into a wheel to the CycloneDX file of its Python requirements: sbom.py FILE [--cuda]."""

from __future__ import annotations

import json
import sys
from pathlib import Path

# As THIRD_PARTY.md has it, and plugins/onnxruntime/include/README.md the version.
COMPILED = [{"type": "library", "name": "onnxruntime", "version": "1.21.0", "scope": "required",
             "description": "its C and C++ headers, compiled in", "licenses": [{"license": {"id": "MIT"}}],
             "purl": "pkg:github/microsoft/onnxruntime@v1.21.0", "bom-ref": "compiled:onnxruntime"},
            {"type": "library", "name": "libstdc++", "scope": "required", "bom-ref": "compiled:libstdc++",
             "description": "with libgcc, linked into the kernels for the CPU",
             "licenses": [{"expression": "GPL-3.0-or-later WITH GCC-exception-3.1"}]}]
WITH_CUDA = [{"type": "library", "name": "tensorrt", "scope": "required", "bom-ref": "compiled:tensorrt",
              "description": "its headers, compiled in", "licenses": [{"license": {"id": "Apache-2.0"}}]},
             {"type": "library", "name": "cudart_static", "scope": "required",
              "description": "CUDA's runtime library, linked in", "bom-ref": "compiled:cudart_static",
              "licenses": [{"license": {"name": "NVIDIA CUDA Toolkit EULA",
                                        "url": "https://docs.nvidia.com/cuda/eula/index.html"}}]}]


def main() -> None:
    """Rewrite the file."""
    path, cuda = Path(sys.argv[1]), "--cuda" in sys.argv
    bom = json.loads(path.read_text(encoding="utf-8"))
    bom["components"] = [*bom.get("components", []), *COMPILED, *(WITH_CUDA if cuda else [])]
    path.write_text(json.dumps(bom, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
