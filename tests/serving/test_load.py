"""Many clients at once: every answer is that of `Generator`, whoever leaves or asks nonsense beside it."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from conftest import SAMPLE
from load_helpers import Pulse, load, requests_of, resident_bytes
from serving import serving

from dmoe_export.generator import Generator

QUESTIONS = [json.loads(line)["question"] for line in (SAMPLE / "held_out.jsonl").read_text().splitlines()]
SYSTEM = " ".join(QUESTIONS[200:210])
CLIENTS = 16


@pytest.fixture(scope="module")
def offline(sample_bundle):
    """Answers of a generator alone."""
    with Generator.open(sample_bundle.folder, threads=1) as generator:
        yield lambda asked: generator.generate([asked.messages], **{
            {"max_tokens": "max_new_tokens"}.get(name, name): value for name, value in asked.options.items()})[0]


@pytest.fixture
def served(sample_bundle):
    with serving(sample_bundle.folder, "--name", "sample", "--threads", 1, "--max-batch", 6,
                 "--prefix-cache", "4M") as one:
        yield one


def check(served, requests, offline):
    """What each was told; then, that nothing of them is left."""
    for asked in requests:
        if asked.kind == "malformed":
            assert asked.status in (400, 404) and asked.error["message"], asked
            continue
        assert asked.status == 200 and asked.error is None, asked
        wanted = offline(asked)
        if asked.kind in ("gone", "deleted"):
            assert wanted.text.startswith(asked.text), asked
            assert asked.kind == "gone" or asked.finish in ("cancelled", "length"), asked
        else:
            reason = {"eos": "stop"}.get(wanted.finish_reason, wanted.finish_reason)
            assert (asked.text, asked.finish) == (wanted.text, reason), asked
    assert served.idle(5)
    for name in ("requests_in_progress", "waiting_rows", "running_rows", "cache_tokens"):
        assert served.metric(f"dmoe_{name}") == 0, name
    outcomes = Counter(record["outcome"] for record in served.records())
    assert served.metric("dmoe_requests_total") == sum(outcomes.values())
    assert not [line for line in served.lines if "failed" in line]


@pytest.mark.parametrize("number", [60, pytest.param(200, marks=pytest.mark.slow)])
def test_every_answer_is_the_offline_one(served, offline, number):
    requests = requests_of(number, number, QUESTIONS, SYSTEM)
    with Pulse(served.port) as pulse:
        load(served.port, requests, CLIENTS)
    assert not pulse.wrong and pulse.beats > 5 and pulse.slowest < 1, pulse
    kinds = Counter(asked.kind for asked in requests)
    assert kinds["malformed"] and kinds["gone"] and kinds["deleted"] and kinds["stream"], kinds
    check(served, requests, offline)
    assert served.metric("dmoe_prefix_hit_tokens_total") > 0
    assert 0 < served.metric("dmoe_prefix_cache_bytes") <= 4 << 20


@pytest.mark.slow
def test_memory_is_flat_over_2000_requests(served):
    """Measured after each 500, when nobody is there. First come the widest forwards, as arenas keep their highest."""
    widest = requests_of(0, 300, QUESTIONS, SYSTEM, cancelled=0, malformed=0)
    for asked in widest:
        asked.messages[:] = [{"role": "system", "content": SYSTEM}, asked.messages[-1]]
        asked.options |= {"max_tokens": 100, "eos_id": -1}
        asked.sent = json.dumps(json.loads(asked.sent) | asked.options | {"messages": asked.messages})
    load(served.port, widest, CLIENTS)
    sizes = []
    for part in range(1, 5):
        load(served.port, requests_of(part, 500, QUESTIONS, SYSTEM), CLIENTS)
        assert served.idle(5)
        sizes.append(resident_bytes(served.process.pid))
    print(f"resident after each 500 requests: {[f'{size / 2**20:.1f} MiB' for size in sizes]}")
    assert max(sizes) - sizes[0] < 0.03 * sizes[0], sizes
