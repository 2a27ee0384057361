"""The expert budget as the kernel sees it: resident memory of the process, and hard limits on it."""

from __future__ import annotations

import gc
import json
import mmap
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from source_helpers import ACQUIRE, RELEASE, as_source

from dmoe_export import export_checkpoint
from dmoe_export.bundle.reader import Bundle
from dmoe_export.checkpoint.synthetic import GEOMETRIES, write_synthetic
from dmoe_export.generator import Generator
from dmoe_export.runtime.cpu import library
from dmoe_export.runtime.cpu.backend import OnnxRuntimeBackend
from dmoe_export.runtime.cpu.mapped_memory import DONTNEED, PAGE, POPULATE_READ, FileIdentity, advise

pytestmark = [pytest.mark.skipif(sys.platform != "linux", reason="the tier is Linux's"),
              pytest.mark.usefixtures("our_kernels")]
EXPERT, EVERYTHING = 6 << 20, 2 * 32 * (6 << 20)  # of `wide_bundle`

# Once without being watched, so that what is no expert is in memory: code, dense weights, buffers.
_GENERATE = """
import json, sys
from pathlib import Path
from dmoe_export.generator import Generator
from dmoe_export.runtime.cpu import library
from dmoe_export.runtime.cpu.mapped_memory import FileIdentity, file_backed_bytes
folder, options, library.INSTALLED = Path(sys.argv[1]), json.loads(sys.argv[2]), Path(sys.argv[3])
generator = Generator.open(folder, backend="onnxruntime", threads=1, verify="sizes", **options)
def generate():
    return generator.generate([[5, 6, 7]], max_new_tokens=125, steps=4, eos_id=-1, min_experts=32)[0]
generate()
if options:
    generator.backend._tier.wait()
print(file_backed_bytes() - FileIdentity.of(folder / "experts.bin").resident_bytes(), flush=True)
answer = generate()
high = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
print(json.dumps({"tokens": answer.token_ids, "residency": answer.stats.residency, "high": high}))
"""


@pytest.fixture(scope="module")
def wide_bundle(tmp_path_factory) -> Bundle:
    """Two MoE layers of 32 experts of 6 MiB: 403 MB, of which token routing uses nearly all in every forward."""
    folder = tmp_path_factory.mktemp("wide")
    config = {"hidden_size": 512, "moe_intermediate_size": 1024, "num_experts": 32, "num_experts_per_tok": 4,
              "num_hidden_layers": 3}
    write_synthetic(folder / "checkpoint", GEOMETRIES["tiny"] | config)
    bundle = export_checkpoint(folder / "checkpoint", folder / "bundle")
    assert bundle.manifest.bytes_per_expert == EXPERT
    return bundle


def _run(bundle: Bundle, enter: Callable[[], object] | None = None, **options):
    """The answer of a process of its own, and the most memory that its experts took, sampled from outside.

    File-backed memory beyond what is no expert. Page tables (smaps) are no witness while pages move: they are walked
    one after the other, and an expert that goes while another comes is counted twice.
    """
    seen = [0]
    with subprocess.Popen([sys.executable, "-c", _GENERATE, str(bundle.folder), json.dumps(options),
                           str(library.INSTALLED)], text=True,
                          stdout=subprocess.PIPE, preexec_fn=enter, env=os.environ | {"OMP_NUM_THREADS": "1"}) as child:
        assert child.stdout
        other = int(child.stdout.readline() or -1)
        if other < 0:
            return None, 0
        with Path(f"/proc/{child.pid}/statm").open() as statm:
            while child.poll() is None:
                statm.seek(0)
                seen.append(int(statm.read().split()[2]) * PAGE - other)
                time.sleep(0.0005)
        answer = child.stdout.read()
    assert child.returncode == 0 and len(seen) > 20
    return json.loads(answer), max(seen)


@pytest.fixture(scope="module")
def plain(wide_bundle):
    answer, peak = _run(wide_bundle)
    assert peak > 0.7 * EVERYTHING  # without a budget every expert that was used is there
    return answer["tokens"]


@pytest.mark.alone
@pytest.mark.parametrize("budget, interval", [
    (160 << 20, "auto"), (160 << 20, "1"), (160 << 20, "never"), (110 << 20, "1"), (110 << 20, "never"),
    (4 * EXPERT, "1"), (4 * EXPERT, "never")])  # the last is the least: one token's experts
def test_resident_memory_obeys_the_budget(wide_bundle, plain, budget, interval):
    answer, peak = _run(wide_bundle, expert_budget=budget, expert_refresh_interval=interval)
    assert 0.9 * budget < peak <= 1.05 * budget  # 10 % are promised; code is paged in meanwhile
    assert answer["tokens"] == plain
    residency = answer["residency"]
    assert residency["peak_bytes"] == budget // EXPERT * EXPERT
    assert residency["misses"] > 0 and residency["dropped_bytes"] > budget


@pytest.mark.alone
def test_resident_memory_of_half_precision_obeys_the_budget(wide_bundle):
    folder, budget = wide_bundle.folder.parent, 55 << 20
    bundle = export_checkpoint(folder / "checkpoint", folder / "half", precision="fp16", compute="fp16")
    assert bundle.manifest.bytes_per_expert == EXPERT // 2
    tokens = _run(bundle)[0]["tokens"]
    answer, peak = _run(bundle, expert_budget=budget, expert_refresh_interval="1")
    assert 0.9 * budget < peak <= 1.05 * budget and answer["tokens"] == tokens
    assert answer["residency"]["peak_bytes"] == budget // (EXPERT // 2) * (EXPERT // 2)
    assert answer["residency"]["dropped_bytes"] > budget


@pytest.mark.alone
def test_the_whole_process_grows_by_the_budget_alone(wide_bundle):
    """Resident set size of everything: what is no expert is the same for every budget."""
    most = {budget: _run(wide_bundle, expert_budget=budget)[0]["high"] for budget in (4 * EXPERT, 160 << 20, 300 << 20)}
    rest = most[4 * EXPERT] - 4 * EXPERT
    for budget, high in most.items():
        assert 0.9 * budget < high - rest < 1.1 * budget


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
    answer, peak = _run(wide_bundle, lambda: (cgroup / "cgroup.procs").write_text(str(os.getpid())),
                        expert_budget=160 << 20)
    assert answer["tokens"] == plain and 144 << 20 < peak <= 164 << 20


@pytest.mark.alone
def test_experts_take_no_private_memory(wide_bundle, plain):
    """`ulimit -d` bounds private memory: without a budget ONNX Runtime's mapping of the experts is of that kind."""
    limit = 400 << 20

    def enter():
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    assert _run(wide_bundle, enter, expert_budget=4 * EXPERT)[0]["tokens"] == plain
    assert _run(wide_bundle, enter) == (None, 0)


@pytest.mark.parametrize("budget", ["13%", "26%", "50%", "100%"])
@pytest.mark.parametrize("bundle", ["golden_bundle", "sample_bundle", "half_sample_bundle"])
def test_page_tables_and_books_agree_in_every_group(bundle, budget, request):
    """Slabs of a few pages lie in one large folio: a fault that brought neighbours along would show here.

    Nor does ONNX Runtime map or read the experts a second time.
    """
    bundle = request.getfixturevalue(bundle)
    file = FileIdentity.of(bundle.folder / "experts.bin")
    gc.collect()
    others = file.resident_bytes()  # mappings of earlier tests
    generator = Generator.open(bundle.folder, backend="onnxruntime", threads=1, verify="sizes", expert_budget=budget,
                               expert_refresh_interval=1)
    tier, seen = generator.backend._tier, []

    class Watched:
        def acquire(self, gate_up: int, experts: np.ndarray) -> int:
            return ACQUIRE(tier.source.acquire)(tier.source.context, gate_up, experts.ctypes.data, len(experts))

        def release(self, gate_up: int, experts: np.ndarray) -> None:
            tier.wait()
            seen.append((file.resident_bytes() - others, int((tier.states() & 1).sum()) * tier._each))
            RELEASE(tier.source.release)(tier.source.context, gate_up, experts.ctypes.data, len(experts))

    generator.backend._backend = OnnxRuntimeBackend(
        bundle, 1, cpu_ops="on", source=as_source(Watched()),
        weights={name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in tier.weights.items()})
    generator.generate([[5, 6, 7]], max_new_tokens=61, steps=3, eos_id=-1)
    assert len(seen) > 8 and all(kernel == books for kernel, books in seen)
    most = bundle.manifest.bytes_per_expert * tier.capacity
    assert max(books for _, books in seen) <= tier.figures()["peak_bytes"] <= most
    generator.backend.close()


def test_the_experts_are_mapped_once(sample_bundle):
    """By us: every mapping of the file is one of the slabs, shared and read-only."""
    file, gate_up = sample_bundle.folder / "experts.bin", sample_bundle.manifest.experts.gate_up_slab_bytes
    gc.collect()
    before = _mappings(file)
    generator = Generator.open(sample_bundle.folder, backend="onnxruntime", threads=1, verify="sizes",
                               expert_budget="50%")
    generator.generate([[5, 6, 7]], max_new_tokens=32)
    mappings = [line for line in _mappings(file) if line not in before]
    sizes = [int(end, 16) - int(start, 16) for start, _, end in (line.split()[0].partition("-") for line in mappings)]
    assert sum(sizes) == file.stat().st_size and max(sizes) == gate_up
    assert all(line.split()[1] == "r--s" for line in mappings)
    generator.backend.close()


def _mappings(file: Path) -> list[str]:
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(f" {file.resolve()}")]


def test_advice_is_seen_in_the_page_tables(tmp_path):
    path = tmp_path / "a b.bin"
    path.write_bytes(bytes(range(256)) * 4096)  # 1 MiB
    file = FileIdentity.of(path)
    with path.open("rb") as handle:
        view = mmap.mmap(handle.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    (start,) = (int(line.split("-")[0], 16) for line in Path("/proc/self/maps").read_text().splitlines()
                if line.endswith("/a b.bin"))
    assert advise(start, 1 << 20, POPULATE_READ) and file.resident_bytes() == 1 << 20
    assert advise(start, 1 << 19, DONTNEED) and file.resident_bytes() == 1 << 19
    assert view[:1 << 20] == bytes(range(256)) * 4096
    path.unlink()
    assert file.resident_bytes() == 1 << 20  # recognised although removed
    view.close()
