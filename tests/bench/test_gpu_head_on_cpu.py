"""The GPU checks of the vocabulary head on the emulated kernels and the stand-in for CUDA: they run, pass and fail."""

from __future__ import annotations

from pathlib import Path

import kernel_helpers
import numpy as np
import pytest
from fake_cudart import HostDevice
from gpu import head_checks
from gpu.spaces import emulated_space
from head_helpers import make_case
from kernel_helpers import BF16, FP16


@pytest.fixture(scope="module")
def space():
    return emulated_space(HostDevice(), Path(kernel_helpers.library()._name))


@pytest.mark.parametrize("kind", [FP16, BF16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("kept", [0, 2])
def test_it_passes(space, kind, kept):
    head_checks.check_head(space, make_case(kind, 2, 9, 5, kept, hidden=72, vocabulary=200))


@pytest.mark.parametrize("which", [0, 1, 2], ids=["token ids", "confidence", "logits"])
def test_wrong_results_are_found(space, monkeypatch, which):
    def wrong(self, run):
        results = list(right(self, run))
        results[which] = results[which] + np.array(1, results[which].dtype) / (1 if which == 0 else 100)
        return tuple(part.astype(kind) for part, kind in zip(results, (np.int64, np.float32, np.float32), strict=True))

    right = head_checks.LoadedHead.results
    monkeypatch.setattr(head_checks.LoadedHead, "results", wrong)
    with pytest.raises(AssertionError):
        head_checks.check_head(space, make_case(FP16, 2, 9, 5, 2, hidden=72, vocabulary=200, mask_id=0))


def test_results_that_change_are_found(space, monkeypatch):
    def other(self, run):
        ids, confidence, logits = right(self, run)
        self.calls = getattr(self, "calls", 0) + 1
        return ids, np.nextafter(confidence, np.float32(self.calls % 2), dtype=np.float32), logits

    right = head_checks.LoadedHead.results
    monkeypatch.setattr(head_checks.LoadedHead, "results", other)
    with pytest.raises(AssertionError):
        head_checks.check_head(space, make_case(FP16))
