"""plugins/kernels/workspace.h, which both adapters use: an aligned workspace wherever the memory starts."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest

HEADER = Path(__file__).parents[1] / "plugins" / "kernels" / "workspace.h"
ALIGNMENT = 256  # what dmoe_experts() refuses less than (dmoe_kernels.h)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    target = tmp_path_factory.mktemp("workspace") / "workspace.so"
    code = (f'#include "{HEADER}"\n'
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
