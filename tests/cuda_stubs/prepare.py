"""What the real CUDA provider of ONNX Runtime needs to run on stubs: the package, the stubs, our custom ops on them.

    python tests/cuda_stubs/prepare.py --out FOLDER [--site FOLDER]

`--site`: a folder that has onnxruntime-gpu already; without one the version of constraints.txt is installed from the
package index into a folder of its own, so that the CPU's package stays what it is. Prints the environment variables of
a process that uses them, as JSON. Standard library only. What is there is not made again.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.append(str(HERE.parent / "helpers"))  # where this runs as a program
import builds  # noqa: E402

_PROVIDER = "onnxruntime/capi/libonnxruntime_providers_cuda.so"


class Unavailable(Exception):
    """Something is not to be had on this machine; one sentence."""


def pinned_version() -> str:
    """Of onnxruntime-gpu, in constraints.txt."""
    return re.findall(r"^onnxruntime-gpu==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[0]


def prepare(out: Path, site: Path | None = None) -> dict[str, str]:
    """The environment of a process on the stubs. Raises Unavailable; one process makes it, others wait."""
    version = pinned_version()
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        site = site or _install(out / f"onnxruntime-gpu-{version}", version)
        provider = site / _PROVIDER
        if not provider.is_file():
            raise Unavailable(f"{site} has no {_PROVIDER}.")
        stubs = out / "stubs"
        cudart = _stubs(out, provider, stubs)
        folder = _compiled(out, "dmoe_onnxruntime_shared", f"-DDMOE_CUDART={cudart}")
    paths = [site, stubs, HERE, ROOT, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(map(str, paths)), "LD_LIBRARY_PATH": str(stubs / "driver"),
            "DMOE_CUDA_STUBS": str(cudart), "DMOE_CUDA_STUBS_OPS": str(folder / "libdmoe_onnxruntime_shared.so")}


def _install(site: Path, version: str) -> Path:
    if not (site / _PROVIDER).is_file():
        partial = site.with_name(f"{site.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        done = subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
                               "--no-deps", "--target", partial, f"onnxruntime-gpu=={version}"], capture_output=True,
                              text=True, check=False)
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip failed"]
            raise Unavailable(f"onnxruntime-gpu {version} could not be installed: {said[-1].removeprefix('ERROR: ')}")
        shutil.rmtree(site, ignore_errors=True)
        partial.rename(site)
    return site


def _stubs(out: Path, provider: Path, stubs: Path) -> Path:
    """Built anew when their sources or the provider changed."""
    build = _script(HERE / "build.py")
    made_from = (provider, *build.SOURCES)
    state = json.dumps([[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in made_from])
    stamp = stubs / "made_from.json"
    if not stamp.is_file() or stamp.read_text() != state:
        shutil.rmtree(stubs, ignore_errors=True)
        try:
            folders = builds.cached(_compiled(out, "dmoe_build_id"), "DMOE_CUDA_INCLUDE").split(";")
            build.build(provider, stubs, Path(folders[0]))
        except build.StubsError as error:
            raise Unavailable(str(error)) from None
        stamp.write_text(state)
    return next(stubs.glob("nvidia/*/lib/libcudart.so.*"))


def _compiled(out: Path, target: str, *options: str) -> Path:
    """Build one target; kernels that `make plugins` has compiled are linked again, not compiled. Returns the folder."""
    made = ROOT / "build" / "cuda"
    if (made / "build.ninja").is_file():
        return builds.build("cuda", *options, target=target)
    return builds.build("cuda", "-DDMOE_CUDA_CODE=90", *options, folder=out / "plugins", target=target)


def _script(path: Path) -> Any:
    """What a script defines."""
    return SimpleNamespace(**runpy.run_path(str(path)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--site", type=Path)
    chosen = parser.parse_args()
    try:
        print(json.dumps(prepare(chosen.out.resolve(), chosen.site and chosen.site.resolve()), indent=1))
    except Unavailable as problem:
        sys.exit(f"[cuda-stubs] {problem}")
