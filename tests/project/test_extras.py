"""What pip is asked for: the extras of pyproject.toml. Nothing is installed here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def version_of(name):
    """The version of a package in constraints.txt."""
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    (found,) = [r for r in map(Requirement, (line for line in lines if not line.startswith("#"))) if r.name == name]
    return next(iter(found.specifier)).version


def named(requirements, name):
    (found,) = [r for r in map(Requirement, requirements) if r.name == name]
    return found


def test_the_gpu_extra_brings_cuda_and_cudnn(project):
    provider = named(project["optional-dependencies"]["gpu"], "onnxruntime-gpu")
    assert provider.extras == {"cuda", "cudnn"}  # else only a machine with a CUDA of its own starts the provider
    assert named(project["optional-dependencies"]["gpu"], "cuda-python").specifier.contains("13.0")


def test_the_gpu_extra_takes_the_tested_provider_and_no_older_one(project):
    """Older ones put opset-23 nodes on the CPU."""
    wanted = named(project["optional-dependencies"]["gpu"], "onnxruntime-gpu").specifier
    assert wanted.contains(version_of("onnxruntime-gpu")) and not wanted.contains("1.30.0")


def test_an_installation_has_one_onnx_runtime(project):
    """Two packages own the module's folder: only who chooses `cpu` or `gpu` gets one, so nobody gets both."""
    brings = {extra for extra, requirements in project["optional-dependencies"].items()
              if any(Requirement(r).name.startswith("onnxruntime") for r in requirements)}
    assert brings == {"cpu", "gpu"} and not [r for r in project["dependencies"] if r.startswith("onnxruntime")]
    assert version_of("onnxruntime") == version_of("onnxruntime-gpu")


NOT_THERE = "import sys\nsys.modules['onnxruntime'] = None\n"
HOLLOW = "import sys, types\nsys.modules['onnxruntime'] = types.ModuleType('onnxruntime')\n"
MISSING = "ONNX Runtime is not installed; run: pip install 'onnxruntime"
IN_PART = "installed in part (two packages share its folder, and one was removed); run: pip uninstall"


@pytest.mark.parametrize(("state", "verb", "sentence"), [
    (NOT_THERE, "inspect", ""), (NOT_THERE, "generate", MISSING), (HOLLOW, "generate", IN_PART)])
def test_without_onnx_runtime(half_sample_bundle, tmp_path, state, verb, sentence):
    """What needs no model goes on; what does ends in one sentence."""
    (tmp_path / "sitecustomize.py").write_text(state)
    more = ["--prompt", "x"] if verb == "generate" else []
    run = subprocess.run([sys.executable, "-m", "dmoe_export", verb, half_sample_bundle.folder, *more], text=True,
                         capture_output=True, env={**os.environ, "PYTHONPATH": str(tmp_path)}, check=False)
    assert run.returncode == (3 if sentence else 0), run.stderr
    assert sentence in run.stderr and run.stderr.count("\n") == bool(sentence)
