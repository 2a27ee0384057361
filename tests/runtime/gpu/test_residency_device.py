"""TensorRT under an expert budget, on the stand-ins: same tokens, true counts, and no slot overwritten too early.

The stand-in compares every slot that a forward may read with the expert the table names, when the forward runs; copies
run as late as `pace` lets them, and their target is poison meanwhile.
"""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from device_helpers import decode
from tensorrt_helpers import Setup, bundle_with_engine, bundle_with_resident_engine, changed

from dmoe_export import Generator, export_checkpoint
from dmoe_export.bundle.engine_entries import EngineEntry
from dmoe_export.bundle.manifest import FileEntry
from dmoe_export.bundle.reader import Bundle, hash_file
from dmoe_export.errors import MissingRequirementError, RequestError
from dmoe_export.runtime.choose import open_under_budget
from dmoe_export.runtime.cpu.backend import OnnxRuntimeBackend
from dmoe_export.runtime.gpu import expert_pools as device_residency
from dmoe_export.runtime.gpu import tensorrt as tensorrt_module
from dmoe_export.runtime.gpu.device import DeviceMemoryError
from dmoe_export.runtime.residency.budget import plan_budget

OPTIONS = {"max_new_tokens": 64, "threshold": 0.99, "steps": 12, "eos_id": -1}


@pytest.fixture(scope="module")
def prompts(golden):
    data = np.load(golden / "generate.npz")
    return [data[f"{run}.prompt"][0].tolist() for run in range(2)]


class Counting(OnnxRuntimeBackend):
    """Counts uses: an expert once per layer and forward."""

    uses = 0

    def forward(self, inputs, cache):
        outputs = super().forward(inputs, cache)
        self.uses += sum(len(set(ids[ids >= 0].tolist())) for ids in outputs.expert_ids)
        return outputs


class Subject:
    """A bundle with an engine that takes a budget, and what it must answer."""

    def __init__(self, bundle, folder, prompts):
        self.bundle, self.prompts = bundle_with_resident_engine(bundle, folder), prompts
        cpu = Counting(bundle)
        self.tokens, self.uses = decode(cpu, prompts, **OPTIONS)[0], cpu.uses
        self.experts, self.layers = bundle.manifest.model.experts.num_experts, len(bundle.manifest.model.moe_layers)
        self.each = bundle.manifest.bytes_per_expert

    def answer(self, backend):
        return decode(backend, self.prompts, **OPTIONS)[0]


@pytest.fixture(scope="module")
def golden_subject(golden_bundle, prompts, tmp_path_factory):
    return Subject(golden_bundle, tmp_path_factory.mktemp("g") / "b", prompts)


@pytest.fixture(scope="module")
def sample_subject(sample_bundle, tmp_path_factory):
    return Subject(sample_bundle, tmp_path_factory.mktemp("s") / "b", [[5, 9, 40, 7, 77, 12], [30] * 40])


@pytest.fixture(scope="module")
def quantised_subject(tiny_checkpoint, tmp_path_factory):
    """Experts of 4 bits, whose scales move with them."""
    bundle = export_checkpoint(tiny_checkpoint, tmp_path_factory.mktemp("q") / "int4", precision="int4",
                               dense_precision="fp32")
    return Subject(bundle, tmp_path_factory.mktemp("q") / "b", [[5, 9, 40, 7, 77, 12], [30] * 40])


def _run(monkeypatch, subject, percent, interval, pace, graphs=True):
    """Decode under a budget; everything that must hold whatever it is."""
    setup = Setup(monkeypatch, subject.bundle, graphs)
    setup.device.fake.pace = pace
    slots = max(1, subject.experts * percent // 100)
    backend = setup.under_budget(slots, interval)
    assert subject.answer(backend) == subject.tokens
    s = backend.statistics()
    assert s.hits + s.misses == subject.uses and s.residents_per_layer == slots
    assert s.brought_bytes % subject.each == 0 and s.brought_bytes <= s.promotions * subject.each
    assert s.peak_bytes == slots * subject.layers * subject.each
    assert 0 <= s.promotions - s.evictions <= slots * subject.layers
    backend.close()
    backend.close()
    assert setup.device.fake.used == 0 and not setup.device.fake.host  # slots, engine, the pinned copy of all experts
    assert backend.statistics() == s
    with pytest.raises(RequestError, match="Backend tensorrt was closed"):
        subject.answer(backend)
    return s, backend, setup


@pytest.mark.parametrize("interval", [1, 4, 32])
@pytest.mark.parametrize("percent", [100, 50, 25, 10])
def test_tokens_do_not_depend_on_budget_and_interval(monkeypatch, sample_subject, percent, interval):
    s, _, _ = _run(monkeypatch, sample_subject, percent, interval, pace=100_000)
    assert s.hits > 0 and s.refreshes > (1 if interval == 32 else 2)
    assert (s.misses == 0 == s.promotions) == (percent == 100)


@pytest.mark.parametrize(("percent", "interval", "pace"), [(50, 4, 1), (25, 1, 20), (10, 4, 100_000)])
def test_golden_model(monkeypatch, golden_subject, percent, interval, pace):
    s, _, _ = _run(monkeypatch, golden_subject, percent, interval, pace)
    assert (s.hits == 0) == (pace == 1)  # on a link that slow no copy ever arrives, and all is served from the host


@pytest.mark.parametrize(("percent", "interval"), [(100, 4), (25, 4)])
def test_quantised_experts(monkeypatch, quantised_subject, percent, interval):
    """Four tensors per layer: `_run` counts the bytes of scales too, the stand-in compares every slot."""
    s, _, _ = _run(monkeypatch, quantised_subject, percent, interval, pace=100_000)
    assert s.hits > 0 and (s.misses == 0) == (percent == 100)


def test_quantised_experts_that_are_engine_inputs(monkeypatch, quantised_subject, tmp_path):
    """No pool: uploaded once, arranged; the bodies under the stand-in get them back by rows."""
    setup = Setup(monkeypatch, bundle_with_engine(quantised_subject.bundle, tmp_path / "b"))
    assert quantised_subject.answer(setup.open()) == quantised_subject.tokens


@pytest.mark.parametrize("resident", [False, True])
def test_an_engine_that_reads_quantised_experts_by_rows_is_refused(monkeypatch, quantised_subject, resident):
    """An older entry does not say; it would compute nonsense with what it is given."""
    bundle = quantised_subject.bundle
    old = EngineEntry.model_validate(bundle.manifest.engines[0].model_dump(exclude={"experts_layout"}))
    setup = Setup(monkeypatch, Bundle(bundle.folder, bundle.manifest.model_copy(update={"engines": [old]})))
    with pytest.raises(MissingRequirementError, match=r"Engine a\.engine reads quantised experts in layout 1, they are "
                       r"now given in layout 2; build it again with: dmoe-export build"):
        setup.under_budget(2, 4) if resident else setup.open()


def test_recorded_steps_follow_the_table(monkeypatch, golden_subject):
    """The same addresses throughout, so graphs are replayed, and they find what arrived after they were recorded."""
    s, backend, setup = _run(monkeypatch, golden_subject, 50, 4, pace=100_000)
    graphs = backend._backend.graphs
    assert graphs.replayed > 5 and not graphs.off
    assert setup.device.fake.calls["cudaGraphLaunch"] == graphs.replayed and s.hits > s.misses
    plain, _, _ = _run(monkeypatch, golden_subject, 50, 4, pace=100_000, graphs=False)
    assert (plain.hits, plain.promotions) == (s.hits, s.promotions)


def test_steps_send_little(monkeypatch, golden_subject):
    """Between refreshes the side stream is idle and the table stays where it is."""
    setup = Setup(monkeypatch, golden_subject.bundle)
    setup.device.fake.pace = 100_000
    backend = setup.under_budget(16, "never")
    golden_subject.answer(backend)
    tables = setup.device.fake.calls["cudaStreamWaitEvent"]
    golden_subject.answer(backend)
    assert tables == setup.device.fake.calls["cudaStreamWaitEvent"] == 1  # the first forward filled the empty slots


def test_the_interval_is_solved_with_measured_costs(monkeypatch, golden_subject):
    s, _, _ = _run(monkeypatch, golden_subject, 25, "auto", pace=1000)
    assert s.bring_cost and s.bring_cost > 0 and s.miss_cost == s.bring_cost and s.last_interval >= 1


def test_without_a_budget_all_experts_are_on_the_device(monkeypatch, golden_subject):
    """An engine with pools needs no host copy then."""
    setup = Setup(monkeypatch, golden_subject.bundle)
    backend = setup.open()
    assert golden_subject.answer(backend) == golden_subject.tokens
    everything = golden_subject.experts * golden_subject.layers * golden_subject.each
    assert setup.device.fake.used > everything > sum(len(array) for array, _ in setup.device.fake.host.values())


def test_a_budget_takes_less_device_memory(monkeypatch, golden_subject):
    used = []
    for slots in (64, 16):
        setup = Setup(monkeypatch, golden_subject.bundle)
        backend = setup.under_budget(slots, 4)
        used.append(setup.device.fake.used)
        del backend
    assert used[0] - used[1] == 48 * golden_subject.layers * golden_subject.each


def test_the_expert_file_may_go_while_it_is_in_use(monkeypatch, golden_subject, tmp_path):
    """The master copy is the process's own."""
    folder = tmp_path / "b"
    shutil.copytree(golden_subject.bundle.folder, folder)
    setup = Setup(monkeypatch, type(golden_subject.bundle)(folder, golden_subject.bundle.manifest))
    setup.device.fake.pace = 100_000
    backend = setup.under_budget(16, 1)
    (folder / "experts.bin").write_bytes(bytes(1000))
    (folder / "experts.bin").unlink()
    assert golden_subject.answer(backend) == golden_subject.tokens and backend.statistics().hits


def test_copies_end_before_their_memory_goes(monkeypatch, golden_subject):
    """A backend that is dropped while copies are on their way: the stand-in refuses copies of freed memory."""
    setup = Setup(monkeypatch, golden_subject.bundle)
    backend = setup.under_budget(32, 1)
    golden_subject.answer(backend)
    assert backend._tier._arrivals
    side, fake = backend._tier._side, setup.device.fake
    del backend
    assert not fake.streams[side].waiting


def test_what_cannot_be(monkeypatch, golden_subject, golden_bundle, tmp_path):
    plain = bundle_with_engine(golden_bundle, tmp_path / "plain")
    with pytest.raises(MissingRequirementError, match=r"no engine that takes an expert budget; .* --experts resident"):
        Setup(monkeypatch, plain).under_budget(8, 4)
    with pytest.raises(DeviceMemoryError, match=r"GB for weights and scratch memory.*give an expert budget"):
        Setup(monkeypatch, golden_subject.bundle, memory=1 << 20).under_budget(32, 4)
    setup = Setup(monkeypatch, golden_subject.bundle)

    with monkeypatch.context() as small, pytest.raises(DeviceMemoryError, match=r"keeps all 0.00 GB .* has 0.00 GB"):
        small.setattr(device_residency, "machine_memory", lambda: 1 << 20)
        setup.under_budget(32, 4)
    pinned = setup.device.pinned

    def no_large_ones(size):
        if size > 1 << 19:
            raise DeviceMemoryError("cudaHostAlloc failed")
        return pinned(size)

    monkeypatch.setattr(setup.device, "pinned", no_large_ones)
    with pytest.raises(DeviceMemoryError, match=r"no room to pin .* of experts \(cudaHostAlloc failed\)"):
        setup.under_budget(32, 4)


@pytest.mark.parametrize("name", ["auto", "tensorrt"])
def test_through_the_generator(monkeypatch, golden_subject, tmp_path, name):
    """A budget given to the generator, the engine found in the manifest, statistics in the answer."""
    bundle, folder = golden_subject.bundle, tmp_path / "b"
    shutil.copytree(bundle.folder, folder)
    engine = folder / "a.engine"
    files = [*bundle.manifest.files, FileEntry(path="a.engine", size=engine.stat().st_size, sha256=hash_file(engine))]
    (folder / "manifest.json").write_text(bundle.manifest.model_copy(update={"files": files}).model_dump_json())
    setup = Setup(monkeypatch, bundle)
    setup.device.fake.pace = 100_000
    monkeypatch.setattr(tensorrt_module.CudaDevice, "open", classmethod(lambda cls: setup.device))
    generator = Generator.open(folder, backend=name, experts_per_layer=16, expert_refresh_interval=4)
    assert generator.backend.name == "tensorrt" and ("expert pools" in generator.backend_choice) == (name == "auto")
    answers = generator.generate(golden_subject.prompts, **OPTIONS)
    assert [answer.token_ids for answer in answers] == golden_subject.tokens
    residency = answers[0].stats.residency
    assert residency["hits"] and residency["misses"] and residency["residents_per_layer"] == 16
    generator.backend.close()


def test_auto_without_a_gpu_keeps_the_budget_on_the_cpu(golden_subject):
    bundle = golden_subject.bundle
    budget = plan_budget(bundle.manifest, experts_per_layer=32)
    backend, why = open_under_budget(bundle, budget, 4)
    assert backend.name == "onnxruntime" and "NVIDIA" in why
    assert golden_subject.answer(backend) == golden_subject.tokens
    backend.close()


def test_a_plain_engine_beside_one_with_pools(monkeypatch, golden_subject):
    """A budget takes the engine with pools, wherever it stands in the list."""
    (entry,) = golden_subject.bundle.manifest.engines
    both = changed(golden_subject.bundle)
    plain = entry.model_copy(update={"experts": "external", "expert_pools": [], "file": "missing.engine"})
    both.manifest.engines.insert(0, plain)
    assert Setup(monkeypatch, both).under_budget(8, 4).limits is not None
