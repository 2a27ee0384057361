"""What an application of Ray is told, and which replica a prompt goes to: rules, without Ray."""

from __future__ import annotations

import inspect

import pytest
from processes import python_without
from pydantic import ValidationError

from dmoe_export.decoding.template import Gap
from dmoe_export.generator import Generator
from dmoe_export.serving.ray.prefix import PART, Affinity, beginnings
from dmoe_export.serving.ray.settings import OF_OPENING, Settings


def test_arguments_of_serve_run_are_text():
    text = {"bundle": "a", "replicas": "2", "gpus": "0.5", "allowed_hosts": "x,y", "log_prompts": "true"}
    made = Settings(**text)
    assert (made.replicas, made.gpus, made.allowed_hosts, made.log_prompts) == (2, 0.5, ("x", "y"), True)


@pytest.mark.parametrize("wrong", [
    {"bundel": "a"}, {"replicas": 0}, {"gpus": -1}, {"gpus": "nan"}, {"max_batch": 0}, {"min_replicas": 1},
    {"target_requests": 2}, {"max_replicas": 1, "replicas": 2}, {"max_replicas": 4, "min_replicas": 3},
    {"backend": "x"}, {"timeout": 0}, {"surge_percent": 101}, {"name": ""}, {"max_waiting": 0}])
def test_what_contradicts_is_refused(wrong):
    with pytest.raises(ValidationError):
        Settings(**{"bundle": "a", **wrong})


def test_a_number_of_replicas_or_rules_for_it():
    assert Settings(bundle="a", replicas=3).scaling == {"num_replicas": 3}
    rules = Settings(bundle="a", replicas=2, min_replicas=1, max_replicas=4, max_batch=6, upscale_delay=5).scaling
    assert rules == {"autoscaling_config": {
        "min_replicas": 1, "max_replicas": 4, "initial_replicas": 2, "target_ongoing_requests": 6.0,
        "upscale_delay_s": 5.0, "downscale_delay_s": 600.0, "look_back_period_s": 5.0, "metrics_interval_s": 2.5}}
    assert Settings(bundle="a", max_batch=8).at_once == 10 and Settings(bundle="a", max_batch=1).at_once == 2


def test_a_replica_opens_its_bundle_with_the_threads_that_it_reserves():
    assert Settings(bundle="a", cpus=4).opening["threads"] == 4
    assert Settings(bundle="a", preset="speed").opening["preset"] == "speed"
    assert Settings(bundle="a", cpus=0.5).opening["threads"] == 1
    assert Settings(bundle="a", cpus=4, threads=2).opening["threads"] == 2
    assert set(OF_OPENING) == set(inspect.signature(Generator.open).parameters) - {"path", "progress"}


def test_beginnings_are_equal_exactly_where_prompts_are():
    text = "".join(chr(97 + i % 26) for i in range(5 * PART))
    marks = beginnings(text, False)
    assert len(marks) == 5 and beginnings(text + "more", False) == marks
    changed = beginnings(text[:2 * PART] + "!" + text[2 * PART:], False)
    assert changed[:2] == marks[:2] and not set(changed[2:]) & set(marks)
    assert not set(beginnings(text, True)) & set(marks)  # the template stands before it
    assert beginnings("short", True) == [] == beginnings([1, 2], False)
    assert len(beginnings("a" * 10 ** 6, False)) == 256


def test_a_text_with_gaps_begins_as_its_first_part_does():
    text, ids = "x" * 2 * PART, list(range(PART))
    for first in (text, ids):
        assert beginnings([first, Gap(4), "x" * 999], False) == beginnings(first, False) != []
    assert beginnings([Gap(4), text], False) == []


def test_messages_and_token_ids_have_beginnings():
    system = {"role": "system", "content": "x" * 300}
    one, two = ([system, {"role": "user", "content": word * 200}] for word in ("a", "b"))
    first, second = beginnings(one, True), beginnings(two, True)
    assert first[:2] == second[:2] and first[-1] != second[-1]
    assert beginnings([{"role": "user", "content": [{"type": "text", "text": "x" * 300}]}], True)
    hostile = [{"content": 10 ** 400}, {"content": [3, {"text": {}}, {"text": "\ud800" * 300}]}, {}]
    assert len(beginnings(hostile, True)) == 2
    ids = list(range(100, 400))
    assert beginnings(ids, False)[:5] == beginnings([*ids[:200], 7, 8], False)[:5]


def choose(affinity, marks, queues):
    return affinity.choose(marks, queues.__getitem__, list(queues))


def test_the_longest_beginning_decides_then_the_shortest_queue():
    affinity = Affinity(margin=2)
    affinity.had([b"1", b"2"], "a")
    affinity.had([b"1"], "b")
    assert choose(affinity, [b"1", b"2", b"3"], {"a": 0, "b": 0, "c": 0}) == "a"
    assert choose(affinity, [b"1", b"x"], {"a": 1, "b": 0, "c": 0}) == "b"
    assert choose(affinity, [b"9"], {"a": 0, "b": 0}) is None and choose(affinity, [], {"a": 0}) is None


def test_a_queue_longer_by_more_than_the_margin_is_not_worth_a_beginning():
    affinity = Affinity(margin=2)
    affinity.had([b"1"], "a")
    assert choose(affinity, [b"1"], {"a": 2, "b": 0}) == "a" and choose(affinity, [b"1"], {"a": 3, "b": 0}) is None


def test_replicas_that_are_gone_and_old_beginnings_are_forgotten():
    affinity = Affinity(most=3)
    affinity.had([b"1"], "a")
    assert choose(affinity, [b"1"], {"b": 0}) is None  # it is none of the candidates
    affinity.only({"b"})
    affinity.had([b"2", b"3", b"4", b"5"], "b")
    assert [choose(affinity, [mark], {"a": 0, "b": 0}) for mark in (b"1", b"2", b"3", b"5")] == [None, None, "b", "b"]


def test_nothing_of_ray_is_imported_unless_used():
    code = ("import dmoe_export.serving.app, dmoe_export.serving.ray.ingress, dmoe_export.serving.ray.remote\n"
            "import dmoe_export.serving.ray.replica, dmoe_export.cli.serve, dmoe_export.cli.deploy_ray\n"
            "assert 'onnxruntime' not in sys.modules\n"
            "try:\n    from dmoe_export.serving.ray import app\n"
            "except ModuleNotFoundError as error:\n    print(error.name)")
    result = python_without(code, blocked=("ray",))
    assert (result.returncode, result.stdout) == (0, "ray\n"), result.stderr
