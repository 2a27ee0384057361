"""Ending an answer: stop strings, time limits, cancelling, asyncio."""

from __future__ import annotations

import asyncio
import doctest
import json
import threading
import time

import pytest
from click.testing import CliRunner
from ending_helpers import LONG, QUESTION, in_thread, of_the_sample, that_waits  # noqa: F401 - fixtures

import dmoe_export
from dmoe_export import Generation, Generator, RequestError, Stream
from dmoe_export.cli import main


def joined(stream):
    return "".join(block.text for block in stream)


def test_the_example_of_the_docstring_prints_what_it_says(sample_bundle, tmp_path, monkeypatch):
    (tmp_path / "sample.bundle").symlink_to(sample_bundle.folder)
    monkeypatch.chdir(tmp_path)
    (example,) = (test for test in doctest.DocTestFinder(recurse=False).find(
        Generator, "Generator", globs={"Generator": Generator}) if test.examples)
    said = []
    result = doctest.DocTestRunner().run(example, out=said.append)
    assert result.attempted == 1 and not result.failed, "".join(said)


def test_all_public_names_are_there():
    assert all(getattr(dmoe_export, name).__name__ == name for name in dmoe_export.__all__)
    kinds = {name for name, kind in vars(dmoe_export.errors).items() if isinstance(kind, type)}
    assert kinds <= set(dmoe_export.__all__) and issubclass(dmoe_export.NotFiniteError, dmoe_export.DmoeError)
    assert {"Block", "Generation", "Statistics", "Stream", "RequestError"} <= set(dmoe_export.__all__)


def test_text_ends_before_a_stop_string(generator):
    whole = generator.generate(QUESTION, max_new_tokens=32)[0]
    assert whole.text == "2 + 3 = 5" and whole.finish_reason == "eos"
    for stop, text in (("=", "2 + 3 "), (["5", "+ 3"], "2 "), (("x", "3 = 5"), "2 + "), ("2", ""), (" = 5", "2 + 3")):
        answer = generator.generate(QUESTION, max_new_tokens=32, stop=stop)[0]
        assert (answer.text, answer.finish_reason) == (text, "stop")
        assert answer.token_ids == whole.token_ids[:len(answer.token_ids)]
        stops = [stop] if isinstance(stop, str) else stop
        assert any(one in generator.text.decode(answer.token_ids) for one in stops)
        assert not any(one in generator.text.decode(answer.token_ids[:-1]) for one in stops)
        assert answer.stats.new_tokens == len(answer.token_ids)
        assert joined(generator.stream(QUESTION, max_new_tokens=32, stop=stop)) == text
    for none in ("6", "2 + 3 = 5 ", "<|endoftext|>", None):
        answer = generator.generate(QUESTION, max_new_tokens=32, stop=none)[0]
        assert (answer.text, answer.finish_reason, answer.token_ids) == (whole.text, "eos", whole.token_ids)


def test_a_stop_string_ends_its_row_alone_and_early(generator):
    """Long answers: the row with the string is not decoded on, its neighbours are as they were."""
    prompts = [QUESTION, "what is 4 plus 4?"]
    options = LONG | {"temperature": 8.0}  # or there would be little text
    free = generator.generate(prompts, **options)
    stop = free[0].text[10:16]
    cut = free[0].text.index(stop)
    first, second = generator.generate(prompts, stop=[stop], **options)
    assert first.text == free[0].text[:cut] and first.finish_reason == "stop"
    assert first.stats.forwards < free[0].stats.forwards
    reason = "stop" if stop in free[1].text else "length"
    assert second.finish_reason == reason and second.text == free[1].text.split(stop)[0]


def test_stop_strings_need_a_tokenizer(tiny_bundle):
    with Generator.open(tiny_bundle.folder, backend="onnxruntime") as ids_only:
        with pytest.raises(RequestError, match="has no tokenizer to find a stop string in; leave stop out"):
            ids_only.stream([[1, 2]], stop="a")
        answer = ids_only.generate([[1, 2, 3]], max_new_tokens=4, eos_id=-1, time_limit=60)[0]
        assert answer.text is None and answer.finish_reason == "length"


@pytest.mark.parametrize("stop", [["a", ""], ["", ""], ["a"] * 17, "a" * 1001, b"a", [b"a"], [1], {"a": 1}, 5])
def test_bad_stop_strings(generator, stop):
    with pytest.raises(RequestError, match=r"^stop is .*, it must be up to 16 texts of 1 to 1000 characters; "):
        generator.generate(QUESTION, stop=stop)


@pytest.mark.parametrize(("name", "value"), [
    ("time_limit", 0), ("time_limit", float("inf")), ("time_limit", float("nan")), ("time_limit", True),
    ("time_limit", "1"), ("max_new_tokens", True), ("max_new_tokens", 10**5000), ("steps", -10**5000),
    ("temperature", 10**400), ("time_limit", 10**400), ("salient_capacity", 10**5000), ("coreset_size", 10**5000),
    ("eos_id", [10**5000]), ("top_p", 10**5000), ("seed", -1)],
    ids=lambda value: value if isinstance(value, str) else "")
def test_numbers_that_are_none_to_decode_with(generator, name, value):
    with pytest.raises(RequestError, match=f"^{name} is "):
        generator.generate(QUESTION, **{name: value})


def test_the_command_line_has_them(sample_bundle):
    def run(*options):
        fixed = ("--prompt", QUESTION, "--max-new-tokens", "32", "--threads", "1")
        result = CliRunner().invoke(main, ["generate", str(sample_bundle.folder), *fixed, *options])
        assert result.exit_code == 0, result.output
        return result

    said = run("--stop", "=", "--stop", "3 =", "--json", "--stream").stdout.splitlines()
    assert json.loads(said[-1])["text"] == "2 + " and json.loads(said[-1])["finish_reason"] == "stop"
    assert "".join(json.loads(line)["text"] for line in said[:-1]) == "2 + "
    late = run("--time-limit", "1e-9")
    assert late.stdout == "\n" and late.stderr.startswith("[timeout: 0 tokens, 0 forward")


def test_a_time_limit_ends_what_takes_too_long(generator):
    whole = generator.generate([QUESTION] * 2, **LONG)
    late = generator.generate([QUESTION] * 2, time_limit=1e-9, **LONG)
    assert [(answer.finish_reason, answer.token_ids, answer.text) for answer in late] == [("timeout", [], "")] * 2
    in_time = generator.generate([QUESTION] * 2, time_limit=600, **LONG)
    assert [answer.token_ids for answer in in_time] == [answer.token_ids for answer in whole]


def test_another_thread_cancels_an_answer(slow):
    cancel = threading.Event()
    join = in_thread(lambda: slow.generate(QUESTION, cancel=cancel, **LONG))
    assert slow.backend.began.wait(60)
    cancel.set()
    slow.backend.turns.release(1000)
    (answer,) = join()
    assert isinstance(answer, Generation) and answer.finish_reason == "cancelled" and slow.backend.forwards == 1
    again = slow.generate(QUESTION, max_new_tokens=32)[0]
    assert again.text == "2 + 3 = 5"  # nothing is left of it


def test_a_stream_can_be_cancelled_and_closed(generator):
    free = list(generator.stream(QUESTION, **LONG))
    stream = generator.stream(QUESTION, **LONG)
    assert isinstance(stream, Stream) and iter(stream) is stream
    assert next(stream).token_ids == free[0].token_ids
    stream.cancel()
    (last,) = list(stream)
    assert (last.token_ids, last.finish_reason) == ([], "cancelled")
    closed = generator.stream(QUESTION, **LONG)
    next(closed)
    closed.close()
    closed.close()
    assert list(closed) == []
    with pytest.raises(RequestError, match=r"^cancel is 5, it must be a threading\.Event\.$"):
        generator.stream(QUESTION, cancel=5)


def test_what_was_cancelled_before_it_began_is_empty(generator):
    cancel = threading.Event()
    cancel.set()
    answers = generator.generate([QUESTION, QUESTION], cancel=cancel)
    found = [(answer.text, answer.finish_reason, answer.stats.forwards) for answer in answers]
    assert found == [("", "cancelled", 0)] * 2


def test_asyncio_gets_the_same_blocks_and_keeps_its_loop(generator):
    wanted = [(b.index, b.token_ids, b.text, b.finish_reason) for b in generator.stream([QUESTION, "hello"], **LONG)]

    async def collect():
        found = []
        async for block in generator.astream([QUESTION, "hello"], **LONG):
            assert threading.current_thread() is threading.main_thread()
            found.append((block.index, block.token_ids, block.text, block.finish_reason))
        return found

    async def both():
        ticks, ended = 0, asyncio.gather(collect(), collect())
        while not ended.done():
            await asyncio.sleep(0)
            ticks += 1
        return await ended, ticks

    results, ticks = asyncio.run(both())
    assert results == [wanted, wanted] and ticks > len(wanted)


def test_errors_come_through_asyncio(generator):
    async def first(prompt, **options):
        async for _ in generator.astream(prompt, **options):
            pass

    with pytest.raises(RequestError, match="max_new_tokens is 0"):
        asyncio.run(first(QUESTION, max_new_tokens=0))
    with pytest.raises(RequestError, match="Prompt 0 is empty"):
        asyncio.run(first(""))


def test_a_task_that_is_cancelled_leaves_nothing_running(slow):
    async def run():
        task = asyncio.create_task(collect())
        while not slow.backend.began.is_set():
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def collect():
        async for _ in slow.astream(QUESTION, **LONG):
            pass

    asyncio.run(run())
    slow.backend.turns.release(1000)
    over = time.monotonic() + 60
    while any(thread.name.startswith("dmoe-astream") for thread in threading.enumerate()):
        assert time.monotonic() < over
        time.sleep(0.001)
    assert slow.backend.forwards == 1


def test_leaving_the_loop_of_asyncio_leaves_nothing_running(slow):
    slow.backend.free = True

    async def run():
        async for _ in slow.astream(QUESTION, **LONG):
            break

    asyncio.run(run())
    seen = slow.backend.forwards
    over = time.monotonic() + 60
    while any(thread.name.startswith("dmoe-astream") for thread in threading.enumerate()):
        assert time.monotonic() < over
        time.sleep(0.001)
    assert slow.backend.forwards == seen < 100
