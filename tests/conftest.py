from __future__ import annotations

from pathlib import Path

import pytest

_SHARED = Path(__file__).parents[2] / "shared" / "golden"
GOLDEN_ROOT = _SHARED if _SHARED.is_dir() else Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden() -> Path:
    """Recorded runs of the dMoE reference (see golden/README.md)."""
    return GOLDEN_ROOT / "llada2_dmoe"
