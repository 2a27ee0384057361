"""The experts' workspace is aligned wherever memory starts: what both adapters use, and TensorRT's as it is built."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest
from builds import ROOT, cached
from engine_helpers import plugin_library

KERNELS = ROOT / "plugins" / "kernels"
ALIGNMENT = 256  # what dmoe_experts() refuses less than (dmoe_kernels.h)
ERROR_POINTER = -4


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    target = tmp_path_factory.mktemp("workspace") / "workspace.so"
    code = (f'#include "{KERNELS}/workspace.h"\n'
            'extern "C" size_t room(int64_t bytes) { return dmoe::roomForWorkspace(bytes); }\n'
            'extern "C" void* aligned(void* memory) { return dmoe::alignedWorkspace(memory); }\n')
    command = ["g++", "-std=c++17", "-shared", "-fPIC", "-xc++", "-", "-o", target]
    subprocess.run(command, input=code, text=True, check=True)
    found = ctypes.CDLL(str(target))
    found.room.argtypes, found.room.restype = [ctypes.c_int64], ctypes.c_size_t
    found.aligned.argtypes, found.aligned.restype = [ctypes.c_void_p], ctypes.c_void_p
    return found


@pytest.mark.parametrize("bytes_", [0, 1, 256, 79_691_776, 1 << 33])
def test_the_workspace_is_aligned_and_inside_what_was_asked_for(library, bytes_):
    room = library.room(bytes_)
    for start in range(1 << 20, (1 << 20) + 2 * ALIGNMENT):
        at = library.aligned(start)
        assert at % ALIGNMENT == 0 and start <= at and at + bytes_ <= start + room


def test_no_memory_stays_none(library):
    assert library.aligned(None) is None


def header_folders():
    """Where TensorRT's and CUDA's headers are that the library was built with."""
    folder = ROOT / "build" / "cuda"
    if not (folder / "CMakeCache.txt").is_file():
        pytest.skip("the plugin library is here, but was built elsewhere")
    return [cached(folder, "DMOE_TENSORRT_INCLUDE"), *cached(folder, "DMOE_CUDA_INCLUDE").split(";")]


def test_the_tensorrt_plugin_takes_a_workspace_that_starts_anywhere(tmp_path):
    """Without a driver a launch fails with an error of CUDA, which comes after the check of all pointers."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        pass
    else:
        pytest.skip("a driver is here, and the launches would get addresses of the host")
    folders = [f"-I{folder}" for folder in (*header_folders(), KERNELS)]
    program = tmp_path / "workspace"
    subprocess.run(["g++", "-std=c++17", "-w", *folders, Path(__file__).with_name("plugin_workspace.cpp"),
                    "-o", program, "-ldl"], check=True)
    done = subprocess.run([program, plugin_library()], capture_output=True, text=True, check=True)
    needed, asked, refused, *results = map(int, done.stdout.split())
    assert asked == needed + ALIGNMENT and refused == ERROR_POINTER
    assert len(results) == ALIGNMENT // 16 and min(results) > 0, results
