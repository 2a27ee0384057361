"""`bench serve`: shape of results, answers that are those of the request alone, and what is counted in a load."""

from __future__ import annotations

import json

import pytest
from bench_helpers import bench, bench_json, check_head

from dmoe_export.bench import serve_load
from dmoe_export.bench.serve import Times
from dmoe_export.bench.serve_load import Answered, Asked, Counts, in_batches, load, server
from dmoe_export.errors import CheckError
from dmoe_export.generator import Generator

QUICK = ("--requests", 4, "--rounds", 1, "--steps", "1-3", "--prompt-tokens", "4-40", "--new-tokens", "4-70",
         "--threads", 1)


@pytest.fixture(scope="module")
def found(tiny_bundle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    found = bench_json("serve", tiny_bundle.folder, "--clients", "1,3", *QUICK, "--out", folder / "s.json", "--plot",
                       folder / "s.png")
    assert (folder / "s.png").read_bytes().startswith(b"\x89PNG")
    assert found == json.loads((folder / "s.json").read_text())
    return found


def test_result_has_every_way_and_equal_answers(found):
    check_head(found, "serve")
    assert [r["clients"] for r in found["results"]] == [1, 3] and found["slots"] == 3
    assert found["differing"] == 0
    lone = found["overhead"]
    assert lone["alone"]["rows_per_step"] == 1 and lone["served"]["rows_per_step"] == 1
    assert lone["alone"]["tokens_per_step"] == pytest.approx(lone["served"]["tokens_per_step"])
    assert lone["share"] > -1 and lone["alone"]["tokens_per_second"]["count"] == 1
    for r in found["results"]:
        for way in (r["joining"], r["closed"]):
            assert way["tokens_per_second"]["median"] > 0
            assert 0 < way["first_block"]["half"] <= way["first_block"]["most"] <= way["first_block"]["longest"]
            assert way["first_block"]["longest"] <= way["answer"]["longest"]
        assert 0 < r["closed"]["rows_per_step"] <= r["clients"] >= r["joining"]["rows_per_step"] > 0
        assert r["steps_over_closed"]["median"] == pytest.approx(
            r["joining"]["tokens_per_step"] / r["closed"]["tokens_per_step"])
        assert r["over_closed"]["median"] == pytest.approx(
            r["joining"]["tokens_per_second"]["median"] / r["closed"]["tokens_per_second"]["median"])


def test_a_load_is_seeded_and_as_long_as_asked(tiny_bundle):
    asked = load(tiny_bundle, 50, (4, 40), (4, 70), (1, 3), 7)
    assert asked == load(tiny_bundle, 50, (4, 40), (4, 70), (1, 3), 7)
    assert asked != load(tiny_bundle, 50, (4, 40), (4, 70), (1, 3), 8)
    lengths, answers = {len(one.prompt) for one in asked}, {one.options["max_new_tokens"] for one in asked}
    assert min(lengths) >= 4 and max(lengths) <= 40 and len(lengths) > 15
    assert min(answers) >= 4 and max(answers) <= 70 and len(answers) > 20


def test_a_closed_batch_waits_for_its_longest(tiny_bundle):
    asked = [Asked([5, 6, 7], {"max_new_tokens": n, "steps": 2, "eos_id": -1}) for n in (64, 8, 8, 8)]
    with Generator.open(tiny_bundle.folder, threads=1) as generator:
        borne = in_batches(generator, asked, 2)
        alone = [generator.generate([one.prompt], **one.options)[0].token_ids for one in asked]
    assert borne.counts.tokens == 88 and borne.counts.steps < borne.counts.rows < 2 * borne.counts.steps
    *_, third, fourth = borne.answers
    assert [answer.token_ids for answer in borne.answers] == alone and borne.tokens == 88
    ends = [answer.blocks[-1][0] for answer in borne.answers]
    assert (third.sent, fourth.sent) == (ends[0], ends[1]) and ends[1] < ends[0]  # each client sends when it is free
    assert fourth.blocks[0][0] > ends[0]  # and waits for the longest


def test_what_arrives_after_the_end_does_not_count():
    ended = Answered(0, 0.0, [(1.0, [1, 2])], ended=True)
    running = Answered(1, 0.0, [(0.5, [3]), (2.0, [4, 5])])
    borne = serve_load._borne([ended, running], 0.0, Counts(1, 1, 1))
    assert (borne.answers, borne.tokens, borne.seconds) == ([ended], 3, 1.0)


def test_times_are_of_all_requests():
    times = Times.of([float(n) for n in range(100, 0, -1)])
    assert (times.half, times.most, times.longest) == (50.5, 96.0, 100.0)


@pytest.mark.parametrize("arguments,sentence", [
    (("--prompt-tokens", "40-4"), "--prompt-tokens is '40-4'; give the least and the most, such as 16-256."),
    (("--clients", "0,2"), "--clients is '0,2'; each must be between 1 and 1000."),
    (("--new-tokens", "9999999"), "prompt and 9999999 new tokens are more than the model's")])
def test_what_it_refuses(tiny_bundle, arguments, sentence):
    result = bench("serve", tiny_bundle.folder, *QUICK, *arguments)
    assert result.exit_code == 2 and sentence in result.stderr


def test_a_server_that_does_not_start_is_told(tmp_path):
    with pytest.raises(CheckError, match=r"The server of the benchmark did not start: .*none\.bundle"), \
            server(tmp_path / "none.bundle", []):
        pass


def test_a_server_that_refuses_ends_the_benchmark(tiny_bundle):
    with server(tiny_bundle.folder, ["--threads", "1", "--max-new-tokens", "8"]) as served, \
            pytest.raises(CheckError, match=r"did not answer a request of the load: .*at most 8 tokens"):
        served.bear([Asked([5, 6], {"max_new_tokens": 9})], 2)
