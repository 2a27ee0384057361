"""What pip is asked for: the extras of pyproject.toml. Nothing is installed here."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REPOSITORY = Path(__file__).parents[1]


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


def test_both_onnx_runtimes_are_tested_in_one_version(project):
    """They share the module's folder, so files of two versions would be mixed."""
    assert version_of("onnxruntime") == version_of("onnxruntime-gpu")
    assert named(project["dependencies"], "onnxruntime").specifier.contains(version_of("onnxruntime"))
