"""Salient steps through device memory equal those on the host, token for token."""

from __future__ import annotations

from dataclasses import replace

import pytest
from device_helpers import decode, host_backend, ranking

from dmoe_export.errors import RequestError
from dmoe_export.runtime.cpu.backend import OnnxRuntimeBackend

PROMPTS = [[5, 6, 7, 1, 9, 2, 4, 4, 3, 8], [9, 9, 4], [2 + i % 50 for i in range(40)]]
COMMON = {"max_new_tokens": 70, "eos_id": -1, "steps": 6, "salient_threshold": 0.9}


def run(backend, prompts=PROMPTS, **options):
    """Tokens and statistics of every prompt."""
    tokens, last = decode(backend, prompts, **(COMMON | options))
    return tokens, [block.statistics for block in last]


def same(bundle, got, **options):
    """As the CPU backend: tokens, what was salient, how often it overflowed, what experts were used."""
    tokens, statistics = run(OnnxRuntimeBackend(bundle, threads=1, cpu_ops="off"), **options)
    assert got[0] == tokens
    for mine, theirs in zip(got[1], statistics, strict=True):
        assert mine.salient_by_step == theirs.salient_by_step
        assert mine.salient_overflows == theirs.salient_overflows
        assert mine.unique_experts == pytest.approx(theirs.unique_experts)
    return got[1]


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("options", [{"salient_capacity": 16}, {"salient_capacity": 4},
                                     {"salient_capacity": 16, "temperature": 1.0, "seed": 3},
                                     {"salient_capacity": 16, "temperature": 1.0, "seed": 3, "top_k": 5}])
def test_block_diffusion(salient_block, graphs, options):
    """A batch whose rows are in different phases; many steps need more than 4 rows."""
    backend = host_backend(salient_block, graphs)
    statistics = same(salient_block, run(backend, **options), **options)
    assert (statistics[0].salient_overflows > 5) == (options.get("salient_capacity") == 4)
    assert all(len(s.salient_by_step) + s.salient_overflows > 5 for s in statistics)


def test_candidates_are_ranked_on_the_device(salient_block):
    options = {"prompts": PROMPTS[:1], "max_new_tokens": 12, "steps": 4, "salient_capacity": 16, "temperature": 1.0,
               "top_k": 5}
    backend = ranking(host_backend(salient_block, True))
    same(salient_block, run(backend, **options), **options)
    assert "candidates" in backend._staging._pinned and "logits" not in backend._staging._pinned


@pytest.mark.parametrize("graphs", [False, True])
def test_full_canvas(salient_llada, graphs):
    """Head and tail of the state: steps over the response against the prompt, and over both."""
    options = {"salient_capacity": 8, "full_steps": 2, "refresh_interval": 7, "salient_threshold": 0.98}
    statistics = same(salient_llada, run(host_backend(salient_llada, graphs), **options), **options)
    assert any(s.salient_overflows for s in statistics) and all(len(s.salient_by_step) > 8 for s in statistics)


def test_all_capacities_serve_where_none_is_asked_for(salient_block):
    """The dynamic result, as no step overflows; which of them run depends on what is salient."""
    backend = host_backend(salient_block)
    options = {"prompts": PROMPTS[:1], "steps": 16, "max_new_tokens": 32}
    statistics = same(salient_block, run(backend, **options), **options)
    assert not any(s.salient_overflows for s in statistics)
    entry = salient_block.manifest.salient
    assert set(backend.salient_executors) == {e.graph.file for e in entry.fixed} | {entry.fill.file}


@pytest.mark.slow
def test_half_precision(salient_half_sample):
    options = {"salient_capacity": 24, "salient_threshold": 0.7, "acceptance": "fixed", "max_new_tokens": 32}
    statistics = same(salient_half_sample, run(host_backend(salient_half_sample, True), **options), **options)
    assert all(s.salient_by_step for s in statistics)


def test_steps_are_recorded_and_the_next_request_replays_them(salient_block):
    """Also with several rows, each with a state of its own."""
    backend = host_backend(salient_block, True)
    for _ in range(3):  # what a request does once is recorded by its second and replayed by its third
        run(backend, PROMPTS[:2], salient_capacity=16)
    calls = [len(executor.sizes) for executor in backend.salient_executors.values()]
    graphs = [graphs for _, graphs in backend.salient_graphs(16).opened.values()]
    assert len(graphs) == 2 and all(not g.off and g.recorded for g in graphs)
    replayed = sum(g.replayed for g in graphs)
    run(backend, PROMPTS[:2], salient_capacity=16)
    assert [len(executor.sizes) for executor in backend.salient_executors.values()] == calls
    assert sum(g.replayed for g in graphs) > replayed + 20


def test_a_step_is_two_copies_and_one_wait(salient_block):
    """States stay on the device, and nothing is allocated once it was there."""
    backend = host_backend(salient_block)
    salient, counts = backend.salient_graphs(16), []
    step = salient.run

    def counted(*arguments):
        before = dict(backend.fake.calls)
        got = step(*arguments)
        names = ("cudaMemcpyAsync", "cudaMemcpy3DAsync", "cudaStreamSynchronize", "cudaMalloc", "cudaHostAlloc")
        counts.append(tuple(backend.fake.calls[name] - before.get(name, 0) for name in names))
        return got

    salient.run = counted
    run(backend, PROMPTS[:1], salient_capacity=16)
    assert counts.count((2, 0, 1, 0, 0)) > len(counts) // 2
    assert all(copies <= 3 and waits == 1 for copies, _, waits, _, _ in counts)


@pytest.mark.parametrize("bundle", ["salient_llada", "salient_block"])
def test_memory_returns_and_closing_frees_it(bundle, request):
    """Also the experts that all graphs share; the sessions hold nothing else of the device's."""
    backend = host_backend(request.getfixturevalue(bundle), True)
    used = []
    for _ in range(3):
        run(backend, PROMPTS[:2], full_steps=1)
        used.append(backend.fake.used)
    assert used[1] == used[2]
    salient = backend.salient_graphs(None)
    backend.close()
    assert backend.fake.used == 0 and not backend.fake.host
    for call in (lambda: backend.salient_graphs(None), lambda: salient.run("fill", {}, None, None, {}, False, 0)):
        with pytest.raises(RequestError, match=r"was closed; open the bundle again\.$"):
            call()


def test_refused(salient_block, salient_llada, tiny_bundle):
    with pytest.raises(RequestError, match="no salient graph for capacity 9, it has graphs for 4, 16; export"):
        run(host_backend(salient_block), salient_capacity=9)
    with pytest.raises(RequestError, match="has no salient graph; export it with --salient"):
        run(host_backend(tiny_bundle))
    entry = salient_llada.manifest.salient.model_copy(update={"fixed": [], "fill": None})
    dynamic = replace(salient_llada, manifest=salient_llada.manifest.model_copy(update={"salient": entry}))
    with pytest.raises(RequestError, match="has no salient graph whose sizes a GPU could know beforehand, it has none "
                                           "of fixed capacity; export it with --salient-capacity 16"):
        run(host_backend(dynamic))
