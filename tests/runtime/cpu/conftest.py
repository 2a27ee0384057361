"""Tests here run on our CPU kernels as these sources make them."""

from __future__ import annotations

import pytest
from cpu_ops_helpers import built

from dmoe_export.runtime.cpu import library


@pytest.fixture(scope="module", autouse=True)
def _kernels():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "INSTALLED", built())
        yield
