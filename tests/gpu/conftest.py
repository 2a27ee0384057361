"""GPU tests skip with one reason where there is no GPU; what they find out is kept as they find it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
from gpu_common import LIBRARY, describe_device, gpu_missing
from gpu_findings import append_finding, write_summary

_HERE = Path(__file__).parent
_REASON = gpu_missing()
FINDINGS: dict[str, Any] = {}  # of this process


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder carries the marker, so that a plain `pytest` leaves it out."""
    for item in items:
        if _HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.timeout(600))
            if _REASON:
                item.add_marker(pytest.mark.skip(reason=_REASON))


def keep(name: str, value: Any) -> None:
    """Keep a finding under a name, at once; DMOE_GPU_RESULTS names the folder."""
    FINDINGS[name] = value
    if folder := os.environ.get("DMOE_GPU_RESULTS"):
        append_finding(Path(folder), name, value)


def missing_custom_ops(why: str) -> NoReturn:
    """Skip, or fail where a run must not pass without them: DMOE_REQUIRE_CUSTOM_OPS=1 (device_run.sh)."""
    if os.environ.get("DMOE_REQUIRE_CUSTOM_OPS") == "1":
        pytest.fail(f"DMOE_REQUIRE_CUSTOM_OPS=1, but the custom ops cannot run: {why}")
    pytest.skip(why)


@pytest.fixture(scope="session")
def found() -> Callable[[str, Any], None]:
    return keep


@pytest.fixture(scope="session")
def device():
    from dmoe_export.runtime.gpu.device import CudaDevice

    device = CudaDevice.open()
    keep("device", describe_device(device))
    return device


@pytest.fixture(scope="session")
def library() -> Path:
    if not LIBRARY.is_file():
        pytest.fail(f"{LIBRARY} does not exist; build it with `make plugins`")
    return LIBRARY


@pytest.fixture(scope="session")
def space(device, library) -> Iterator[Any]:
    import torch

    from .spaces import cuda_space

    if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # each would take all cores
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(workers)))
    space = cuda_space(device, library)
    yield space
    space.close()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Findings last, where a cut log still has them; those of pytest's workers are in the file alone."""
    if FINDINGS:
        terminalreporter.write_sep("=", "findings on this GPU")
        for name, value in FINDINGS.items():
            terminalreporter.write_line(f"{name}: {json.dumps(value)[:300]}")
    folder = os.environ.get("DMOE_GPU_RESULTS")
    if folder and (path := write_summary(Path(folder))):
        terminalreporter.write_line(str(path))
