"""GPU tests skip with one reason where there is no GPU; what they find out is printed and kept as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gpu_common import (
    LIBRARY,
    KernelLibrary,
    describe_device,
    describe_run,
    gpu_missing,
    result_path,
    write_result,
)

_HERE = Path(__file__).parent
_REASON = gpu_missing()
FINDINGS: dict[str, Any] = {}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder carries the marker, so that a plain `pytest` leaves it out."""
    for item in items:
        if _HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.timeout(600))
            if _REASON:
                item.add_marker(pytest.mark.skip(reason=_REASON))


def write_findings(folder: Path, findings: dict[str, Any]) -> Path:
    """gpu_test_<device>_<date>.json; several runs of a day add to one file, as the tests may be run in parts."""
    device = findings.get("device", {"name": "unknown"})
    result = describe_run("gpu_test", device, KernelLibrary(LIBRARY) if LIBRARY.is_file() else None)
    path = result_path(result, folder)
    before = json.loads(path.read_text())["findings"] if path.is_file() else {}
    return write_result({**result, "findings": {**before, **findings}}, folder)


@pytest.fixture(scope="session")
def device():
    from dmoe_export.runtime.device import CudaDevice

    device = CudaDevice.open()
    FINDINGS["device"] = describe_device(device)
    return device


@pytest.fixture(scope="session")
def library() -> Path:
    if not LIBRARY.is_file():
        pytest.fail(f"{LIBRARY} does not exist; build it with `make plugins`")
    return LIBRARY


@pytest.fixture(scope="session")
def space(device, library):
    from .spaces import cuda_space

    return cuda_space(device, library)


@pytest.fixture(scope="session")
def found() -> Callable[[str, Any], None]:
    """Keep a finding under a name; DMOE_GPU_RESULTS names the folder."""

    def keep(name: str, value: Any) -> None:
        FINDINGS[name] = value

    return keep


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Device and findings last, where a cut log still has them."""
    if not FINDINGS:
        return
    terminalreporter.write_sep("=", "findings on this GPU")
    terminalreporter.write_line(json.dumps(FINDINGS, indent=1))
    if folder := os.environ.get("DMOE_GPU_RESULTS"):
        terminalreporter.write_line(str(write_findings(Path(folder), FINDINGS)))
