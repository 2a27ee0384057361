"""A joining batch over bundles of every family: each answer is that of the request alone, on the CPU and a device."""

from __future__ import annotations

import gc
from pathlib import Path
from random import Random

import numpy as np
import pytest
from device_helpers import host_backend
from joining import Asked, check, live, take
from residency_helpers import open_generator

from dmoe_export.decoding.batch import JoiningBatch
from dmoe_export.runtime.cpu.backend import OnnxRuntimeBackend
from dmoe_export.runtime.gpu.device import DeviceMemoryError

pytestmark = pytest.mark.usefixtures("our_kernels")

ANY = [{}, {"temperature": 0.8, "seed": 5, "top_p": 0.9}, {"temperature": 0.8, "seed": 6, "top_k": 4},
       {"acceptance": "fixed", "steps": 5}, {"acceptance": "hierarchy", "threshold": 0.3},
       {"edit_threshold": 0.2, "edit_passes": 2}, {"acceptance": "credit", "threshold": 0.4}, {"cache": "none"}]
CAUSAL = [{"schedule": "reference"}, {"threshold": 0.2}]
FULL = [{"cache": "prefix"}, {"cache": "dual", "block_length": 16}, {"cache": "dual"}]
TOP_P = [{"coreset_top_p": 0.3}, {"min_experts": 4, "coreset_top_p": 0.1}]
SALIENT = [{"salient_threshold": 0.98}, {"salient_threshold": 1.5, "exact_first_layer": True}]
FAMILIES = {"llada2_dmoe": CAUSAL + TOP_P, "top_c": [*CAUSAL, {"coreset_size": 3}, {"coreset_size": 2}],
            "sdar": CAUSAL, "sdar_moe": CAUSAL, "llada_dense": FULL, "llada_moe": FULL, "dream": FULL,
            "salient_block": [*CAUSAL, *TOP_P, *SALIENT],
            "salient_llada": [*FULL, *SALIENT, {"salient_threshold": 0.98, "salient_capacity": 8}]}


@pytest.fixture
def bundle_of(request, golden, exported, golden_bundle):
    def bundle(family):
        if family.startswith("salient"):
            return request.getfixturevalue(family)
        if family == "top_c":
            return exported(request.getfixturevalue("tiny_checkpoint"), routing="top_c", block_length=8)
        return golden_bundle if family == "llada2_dmoe" else exported(golden.parent / family / "model")

    return bundle


def requests(random, backend, changes, count):
    """Each kind of settings once or more, with prompts around the lengths at which blocks end; some with templates."""
    n, vocabulary = backend.routing.block_length, backend.description.vocab_size
    rows = []
    for i in range(count):
        prompt = random.choices(range(5, min(300, vocabulary)), k=random.choice([1, n - 1, n, n + 3, 2 * n + 5]))
        options = {"max_new_tokens": random.randint(1, 2 * n), "steps": 6, "threshold": 0.5, "eos_id": -1}
        places = [random.choice([None, random.randrange(5, min(250, vocabulary - 8))])
                  for _ in range(options["max_new_tokens"])]
        rows.append(Asked(prompt, options | changes[i % len(changes)], index=i % 3,
                          places=places if i % 3 and None in places else None))
    random.shuffle(rows)
    return rows


@pytest.mark.parametrize("family", FAMILIES)
def test_each_answer_is_its_own(bundle_of, family):
    random, backend = Random(family), OnnxRuntimeBackend(bundle_of(family))
    changes = ANY + FAMILIES[family]
    rows = requests(random, backend, changes, len(changes) + 1)
    live(JoiningBatch(backend, 3), rows, random)
    check(rows, backend)


@pytest.mark.parametrize("family", ["llada2_dmoe", "dream"])
def test_on_a_device(bundle_of, family):
    """Rows of its slab are read where they lie, or gathered; steps are recorded and replayed."""
    bundle = bundle_of(family)
    random, backend = Random(family), host_backend(bundle, cuda_graphs=True)
    rows = requests(random, backend, [{}, {"cache": "none"}, *FAMILIES[family]], 8)
    live(JoiningBatch(backend, 4), rows, random)
    assert backend.graphs.replayed
    check(rows, OnnxRuntimeBackend(bundle, cpu_ops="off"))


def test_a_device_without_memory_for_a_long_row_goes_on_with_the_others(golden_bundle):
    backend, options = host_backend(golden_bundle), {"max_new_tokens": 60, "threshold": 0.5, "eos_id": -1, "steps": 8}
    batch = JoiningBatch(backend, 3)
    short, long, later = (Asked([5 + i] * n, options) for i, n in enumerate((33, 200, 40)))
    short.join(batch)
    while not short.handle.row.block:
        take(batch, [short])
    backend.fake.memory = backend.fake.used + 400_000  # for its forward, not for three rows of its length
    long.join(batch)
    while len(batch):
        take(batch, [short, long])
    assert isinstance(long.last.error, DeviceMemoryError) and "GB more are needed" in str(long.last.error)
    live(batch, [later], Random(0), cancelling=0)
    check([short, later], OnnxRuntimeBackend(golden_bundle, cpu_ops="off"))


@pytest.mark.parametrize("family", ["llada2_dmoe", "salient_block"])
def test_under_an_expert_budget(bundle_of, family):
    bundle, random = bundle_of(family), Random(family)
    with open_generator(bundle, expert_budget="50%", expert_refresh_interval=2) as generator:
        rows = requests(random, generator.backend, [{}, *FAMILIES[family]], 7)
        live(JoiningBatch(generator.backend, 3), rows, random)
        assert generator.backend.statistics().refreshes > 3
    check(rows, OnnxRuntimeBackend(bundle))


def test_statistics_of_residency_are_of_the_time_in_the_batch(golden_bundle):
    """Another row's forwards count, too, while both are there: experts serve whoever asks."""
    with open_generator(golden_bundle, expert_budget="50%", expert_refresh_interval=1) as generator:
        batch, uses = generator.batch(2), {}
        short, long = (generator.request([5, 6, 7], max_new_tokens=n, eos_id=-1, threshold=1.0, steps=4)
                       for n in (32, 96))
        rows = [batch.add(long), batch.add(short)]
        while len(batch):
            for event in batch.step():
                if event.last:
                    found = event.block.stats.residency
                    uses[event.handle] = found["hits"] + found["misses"]
        assert uses[rows[0]] > uses[rows[1]] > 0
        total = generator.backend.statistics()
        assert uses[rows[0]] == total.hits + total.misses


@pytest.mark.slow
def test_memory_is_flat_over_2000_rows(golden_bundle):
    """Some cancelled, some with a fault: what the process has after 1 000 is what it has after 2 000."""
    random, batch = Random(0), JoiningBatch(Poisoned(OnnxRuntimeBackend(golden_bundle, 1), 7), 6)
    held = []
    for _ in range(4):
        rows = [Asked([random.choice([5, 6, 7, *range(8, 60)])] * random.choice([1, 20, 33, 70, 200]),
                      {"max_new_tokens": random.choice([8, 32, 40]), "steps": 2, "eos_id": -1,
                       "cache": random.choice(["block", "none"])}) for _ in range(500)]
        live(batch, rows, random, cancelling=0.3)
        assert len(batch) == 0 and not batch._cache.lengths.any() and batch._cache.positions.shape[1] == 1
        gc.collect()
        held.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096)
    assert held[3] - held[1] < 4 << 20, held  # by then every shape was there once


class Poisoned:
    """A backend whose keys and values are NaN for rows that begin with a token."""

    def __init__(self, backend, token):
        self._backend, self._token = backend, token
        self.name, self.description = backend.name, backend.description
        self.routing, self.limits, self.new_cache = backend.routing, backend.limits, backend.new_cache
        self.opens_blocks = backend.opens_blocks

    def forward(self, inputs, cache):
        outputs = self._backend.forward(inputs, cache)
        bad = (inputs.input_ids[:, 0] == self._token) & (inputs.position_ids[:, 0] == 0)
        if bad.any() and inputs.want_keys_values:
            for arrays in outputs.keys_values:
                for x in arrays:
                    x[bad] = np.nan
        return outputs


@pytest.mark.parametrize("cpu_ops", ["auto", "off"])
def test_a_row_of_nan_leaves_a_clean_place(golden_bundle, cpu_ops):
    """Who comes next reads zeros where nothing is cached: a key that is not seen has weight 0, and 0 · NaN is NaN."""
    plain = OnnxRuntimeBackend(golden_bundle, cpu_ops=cpu_ops)
    batch = JoiningBatch(Poisoned(plain, 7), 2)
    options = {"max_new_tokens": 40, "threshold": 0.5, "eos_id": -1, "steps": 4}
    bad, moved = Asked([7] * 100, options), Asked([9] * 40, options)
    live(batch, [bad, moved], Random(0), cancelling=0)
    assert bad.last.error is not None
    after = [Asked([11] * 40, options), Asked([12] * 33, options)]
    live(batch, after, Random(0), cancelling=0)
    check([moved, *after], plain)
