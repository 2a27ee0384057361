"""A generator of the sample, and one whose forwards wait."""

from __future__ import annotations

import pytest
from ending_helpers import Slow

from dmoe_export import Generator


@pytest.fixture(scope="module")
def generator(sample_bundle):
    with Generator.open(sample_bundle.folder, backend="onnxruntime", threads=1) as generator:
        yield generator


@pytest.fixture
def slow(generator):
    backend = Slow(generator.backend)
    yield Generator(generator.bundle, backend)
    backend.free = True
    backend.turns.release(1000)
