"""The expert budget as the kernel sees it: resident memory of the mapped file, and a hard limit on the process."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dmoe_export import export_checkpoint
from dmoe_export.bundle.reader import Bundle
from dmoe_export.checkpoint.synthetic import GEOMETRIES, write_synthetic
from dmoe_export.runtime.mapped_memory import DONTNEED, POPULATE_READ, FileIdentity, Span, addresses, advise, new_spans

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the tier is Linux's")

_GENERATE = """
import json, sys
from dmoe_export.generator import Generator
folder, options = sys.argv[1], json.loads(sys.argv[2])
generator = Generator.open(folder, backend="onnxruntime", threads=1, verify="sizes", **options)
print("open", flush=True)
answer = generator.generate([[5, 6, 7]], max_new_tokens=125, steps=4, eos_id=-1, min_experts=32)[0]
print(json.dumps({"tokens": answer.token_ids, "residency": answer.stats.residency}))
"""


@pytest.fixture(scope="module")
def wide_bundle(tmp_path_factory) -> Bundle:
    """Two MoE layers of 32 experts of 6.3 MB: 403 MB, of which token routing uses nearly all in every forward."""
    folder = tmp_path_factory.mktemp("wide")
    config = {"hidden_size": 512, "moe_intermediate_size": 1024, "num_experts": 32, "num_experts_per_tok": 4,
              "num_hidden_layers": 3}
    write_synthetic(folder / "checkpoint", GEOMETRIES["tiny"] | config)
    return export_checkpoint(folder / "checkpoint", folder / "bundle")


def _run(bundle: Bundle, cgroup: Path | None = None, **options):
    """The answer of a process of its own, and the most of the expert file it had in memory, sampled from outside."""
    file, peak = FileIdentity.of(bundle.folder / "experts.bin"), 0
    enter = (lambda: (cgroup / "cgroup.procs").write_text(str(os.getpid()))) if cgroup else None
    with subprocess.Popen([sys.executable, "-c", _GENERATE, str(bundle.folder), json.dumps(options)], text=True,
                          stdout=subprocess.PIPE, preexec_fn=enter) as child:
        assert child.stdout and child.stdout.readline() == "open\n"
        while child.poll() is None:
            with contextlib.suppress(OSError):  # it has just ended
                peak = max(peak, file.resident_bytes(child.pid))
            time.sleep(0.002)
        answer = child.stdout.read()
    assert child.returncode == 0
    return json.loads(answer), peak


def _within(budget: int, bundle: Bundle, cgroup: Path | None = None, **options):
    """The answer of a run whose peak is the budget at most 10 % over; the watching thread is a guest of the scheduler,
    so a run beside other work has four more tries."""
    for _ in range(5):
        answer, peak = _run(bundle, cgroup, expert_budget=budget, **options)
        if peak <= 1.1 * budget:
            break
    assert 0.75 * budget < peak <= 1.1 * budget
    return answer


@pytest.fixture(scope="module")
def plain(wide_bundle):
    answer, peak = _run(wide_bundle)
    assert peak > 0.7 * 403e6  # without a budget every expert that was used is there
    return answer["tokens"]


@pytest.mark.alone
@pytest.mark.parametrize("interval", ["auto", "1", "never"])
def test_resident_memory_obeys_the_budget(wide_bundle, plain, interval):
    budget = 160 << 20
    answer = _within(budget, wide_bundle, expert_refresh_interval=interval)
    assert answer["tokens"] == plain
    assert answer["residency"]["misses"] > 0 and answer["residency"]["dropped_bytes"] > budget


@pytest.fixture
def cgroup():
    """A memory cgroup with a limit below the experts' size."""
    limit = 330 << 20
    for root, name in ((Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
                       (Path("/sys/fs/cgroup"), "memory.max")):
        group = root / f"dmoe-residency-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / name).write_text(str(limit))
            (group / "cgroup.procs").write_text("")
        except FileNotFoundError:
            group.rmdir()
            continue
        except OSError:
            pass  # an empty list of processes is refused; the limit is set
        yield group
        group.rmdir()
        return
    pytest.skip("this user cannot make a memory cgroup")


@pytest.mark.alone
def test_survives_a_hard_limit(wide_bundle, plain, cgroup):
    assert _within(160 << 20, wide_bundle, cgroup)["tokens"] == plain


def test_new_mappings_are_told_from_old_ones():
    old = [Span(100, 200, 0), Span(300, 400, 0)]
    assert new_spans(old, [*old, Span(500, 600, 50)]) == [Span(500, 600, 50)]
    assert new_spans(old, [Span(50, 200, 0), Span(300, 450, 0)]) == [Span(50, 100, 0), Span(400, 450, 100)]
    assert new_spans(old, old) == []
    spans = [Span(1000, 2000, 0), Span(5000, 5500, 500)]
    assert addresses(spans, 600, 100) == [1600, 5100] and addresses(spans, 450, 100) == [1450]


def test_advice_is_seen_in_the_page_tables(tmp_path):
    import mmap

    path = tmp_path / "a b.bin"
    path.write_bytes(bytes(range(256)) * 4096)  # 1 MiB
    file = FileIdentity.of(path)
    before = file.spans()
    with path.open("rb") as handle:
        view = mmap.mmap(handle.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    (span,) = new_spans(before, file.spans())
    assert advise(span.start, 1 << 20, POPULATE_READ) and file.resident_bytes() == 1 << 20
    assert advise(span.start, 1 << 19, DONTNEED) and file.resident_bytes() == 1 << 19
    assert view[:1 << 20] == bytes(range(256)) * 4096
    path.unlink()
    assert file.resident_bytes() == 1 << 20  # recognised although removed
    view.close()
    assert file.spans() == []
