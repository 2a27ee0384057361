"""Salient steps on TensorRT, with and without an expert budget, on the stand-ins: same tokens as on the CPU.

The stand-in compares every slot that a step may read with the expert the table names (`test_residency_device.py`).
"""

from __future__ import annotations

import shutil

import pytest
from device_helpers import decode, host_backend
from tensorrt_helpers import Setup, bundle_with_engine, bundle_with_resident_engine, changed, with_salient_engines

from dmoe_export import Generator
from dmoe_export.bundle.manifest import FileEntry
from dmoe_export.bundle.reader import Bundle, hash_file
from dmoe_export.errors import RequestError
from dmoe_export.runtime.cpu.backend import OnnxRuntimeBackend
from dmoe_export.runtime.gpu import tensorrt as tensorrt_module

PROMPTS = [[5, 6, 7, 1, 9, 2, 4, 4, 3, 8], [9, 9, 4]]
OPTIONS = {"max_new_tokens": 40, "eos_id": -1, "steps": 6, "salient_threshold": 0.9}
ROOMY = {"salient_capacity": 16}
NARROW = {"salient_capacity": 4, "steps": 16, "salient_threshold": 0.95}  # a quarter of the steps overflow
DRAWN = {**ROOMY, "temperature": 1.0, "top_k": 5, "seed": 3}


def run(backend, **options):
    """Tokens; salient rows, overflows and mean of unique experts of every prompt."""
    tokens, last = decode(backend, PROMPTS, **(OPTIONS | options))
    return tokens, [(s.salient_by_step, s.salient_overflows, pytest.approx(s.unique_experts))
                    for s in (block.statistics for block in last)]


@pytest.fixture(scope="module")
def reference(salient_block):
    """What the CPU backend answers, once per options."""
    known = {}

    def of(**options):
        key = tuple(sorted(options.items()))
        if key not in known:
            known[key] = run(OnnxRuntimeBackend(salient_block, threads=1, cpu_ops="off"), **options)
        return known[key]
    return of


@pytest.fixture(scope="module")
def plain(salient_block, tmp_path_factory):
    return with_salient_engines(bundle_with_engine(salient_block, tmp_path_factory.mktemp("p") / "b"))


@pytest.fixture(scope="module")
def resident(salient_block, tmp_path_factory):
    return with_salient_engines(bundle_with_resident_engine(salient_block, tmp_path_factory.mktemp("r") / "b"))


@pytest.mark.parametrize(("rtx", "graphs"), [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize("options", [ROOMY, NARROW, DRAWN])
def test_same_tokens(monkeypatch, plain, reference, rtx, graphs, options):
    """A step that overflows is repeated on the engine of `fill`."""
    monkeypatch.setattr(tensorrt_module, "installed", lambda: None)  # no GPU to rank candidates on
    backend = Setup(monkeypatch, plain, graphs, rtx).open()
    assert run(backend, **options) == reference(**options)
    assert (reference(**options)[1][0][1] > 5) == (options == NARROW)
    capacity = options["salient_capacity"]
    assert set(backend.salient_graphs(capacity).opened) == {capacity, "fill"}


def test_a_full_canvas(monkeypatch, salient_llada, tmp_path):
    """A dense model: nothing to share but scratch memory; steps over prompt and response are wider than 32 tokens."""
    bundle = with_salient_engines(bundle_with_engine(salient_llada, tmp_path / "b"))
    options = {"salient_capacity": 8, "full_steps": 2, "refresh_interval": 7, "salient_threshold": 0.98}
    want = run(OnnxRuntimeBackend(salient_llada, threads=1, cpu_ops="off"), **options)
    assert run(Setup(monkeypatch, bundle).open(), **options) == want and any(overflows for _, overflows, _ in want[1])


def test_steps_are_recorded_and_weights_are_on_the_device_once(monkeypatch, plain, salient_block):
    """All capacities: as the CUDA provider's graphs have it; the other engines bring no weights; closing frees all."""
    setup = Setup(monkeypatch, plain)
    backend, fake = setup.open(), setup.device.fake
    used, want = [], run(host_backend(salient_block))
    for _ in range(3):
        assert run(backend) == want
        used.append(fake.used)
    opened = backend.salient_graphs(None).opened
    assert {graph for graph in opened if graph != "fill"} <= {4, 16} and len(opened) >= 2
    assert all(graphs.recorded and graphs.replayed and not graphs.off for _, graphs in opened.values())
    executors = [executor for executor, _ in opened.values()]
    assert all(executor._weights is backend._executor._weights for executor in executors)
    assert all(executor._scratch is backend._executor._scratch for executor in executors)
    assert used[1] == used[2]
    backend.close()
    assert fake.used == 0 and not fake.host


@pytest.mark.parametrize(("slots", "interval", "pace"), [(8, 4, 100_000), (3, 1, 100_000), (2, 1, 20), (2, 4, 1)])
@pytest.mark.parametrize("options", [ROOMY, NARROW])
def test_under_a_budget(monkeypatch, resident, reference, slots, interval, pace, options):
    """Few slots, late copies, steps that overflow: the same tokens, rows and experts; every use is a hit or a miss."""
    setup = Setup(monkeypatch, resident)
    setup.device.fake.pace = pace
    backend = setup.under_budget(slots, interval)
    assert run(backend, **options) == reference(**options)
    s = backend.statistics()
    assert s.residents_per_layer == slots and s.refreshes > 1 and s.misses and s.hits
    salient = backend.salient_graphs(options["salient_capacity"])._graphs.opened
    assert len(salient) == 2 and all(executor.experts is backend._tier for executor, _ in salient.values())
    backend.close()
    assert setup.device.fake.used == 0 and not setup.device.fake.host


def test_uses_are_counted_and_the_policy_sees_them(monkeypatch, resident):
    """Every run of an engine is counted, also one that overflowed; the policy moves experts after steps."""
    setup = Setup(monkeypatch, resident)
    setup.device.fake.pace = 100_000
    backend = setup.under_budget(4, 1)
    uses, ran = [], backend.ran

    def counted(ids):
        uses.append(sum(len(set(layer[layer >= 0].tolist())) for layer in ids))
        ran(ids)

    monkeypatch.setattr(backend, "ran", counted)
    run(backend, **NARROW)
    s, salient = backend.statistics(), backend.salient_graphs(4)._graphs.opened
    assert s.hits + s.misses == sum(uses) and s.promotions > 4 * len(resident.manifest.model.moe_layers)
    assert len(uses) > s.refreshes > 3 and set(salient) == {4, "fill"}


def test_bundles_whose_engines_do_not_serve(monkeypatch, plain, resident, salient_block):
    """Built before there were any of salient graphs, or of another kind than the denoiser's: one sentence."""
    denoiser, *others = plain.manifest.engines
    pools, *_ = resident.manifest.engines

    def bundle(*engines):
        return Bundle(plain.folder, plain.manifest.model_copy(update={"engines": list(engines)}))

    again = (r"holds no engine of denoiser\.salient\.4\.onnx that goes with a\.engine; leave salient_threshold out, or "
             r"build all of them with: dmoe-export build \S+ --flavour tensorrt --targets sm86,sm89 --experts external "
             r"--experts-op plugin --max-batch 4 --max-prefill 96 --max-context 600\.$")
    older = denoiser.model_validate({k: v for k, v in denoiser.model_dump().items() if k != "graph"})
    others = {entry.graph: entry for entry in others}
    four, fill = others["denoiser.salient.4.onnx"], others["denoiser.salient.fill.onnx"]
    for engines in ((older,), (denoiser, fill), (denoiser, fill, four.model_copy(update={"targets": ["sm80"]})),
                    (denoiser, fill, four.model_copy(update={"version": "9.9"})),
                    (denoiser, fill, four.model_copy(update={"flags": ["hardware-compatible"]})),
                    (denoiser, fill, four.model_copy(update={"weight_inputs": []})),
                    (denoiser, fill, four.model_copy(update={"expert_pools": pools.expert_pools}))):
        backend = Setup(monkeypatch, bundle(*engines)).open()
        with pytest.raises(RequestError, match=again):
            run(backend, salient_capacity=4)
        backend.close()
    with pytest.raises(RequestError, match="no salient graph for capacity 9, it has graphs for 4, 16"):
        run(Setup(monkeypatch, plain).open(), salient_capacity=9)
    inline = changed(bundle(denoiser), experts="inline")
    with pytest.raises(RequestError, match="--experts external --experts-op plugin"):
        Setup(monkeypatch, inline).open().salient_graphs(4)


def test_a_salient_engine_does_not_open_a_bundle(monkeypatch, plain):
    """Wherever it stands in the list."""
    denoiser, *others = plain.manifest.engines
    turned = Bundle(plain.folder, plain.manifest.model_copy(update={"engines": [*others, denoiser]}))
    backend = Setup(monkeypatch, turned).open()
    assert backend.limits.max_batch == 4
    backend.close()


@pytest.mark.parametrize("budget", [{}, {"experts_per_layer": 3, "expert_refresh_interval": 1}])
def test_through_the_generator(monkeypatch, resident, reference, tmp_path, budget):
    """Engines found in the manifest on disk; tokens as without a GPU."""
    folder, manifest = shutil.copytree(resident.folder, tmp_path / "b"), resident.manifest
    paths = [folder / entry.file for entry in manifest.engines]
    files = [FileEntry(path=path.name, size=path.stat().st_size, sha256=hash_file(path)) for path in paths]
    (folder / "manifest.json").write_text(
        manifest.model_copy(update={"files": [*manifest.files, *files]}).model_dump_json())
    setup = Setup(monkeypatch, resident)
    setup.device.fake.pace = 100_000
    monkeypatch.setattr(tensorrt_module.CudaDevice, "open", classmethod(lambda cls: setup.device))
    with Generator.open(folder, backend="tensorrt", **budget) as generator:
        answers = generator.generate(PROMPTS, **OPTIONS, **ROOMY)
        assert [answer.token_ids for answer in answers] == reference(**ROOMY)[0]
        assert bool(answers[0].stats.residency) == bool(budget)
