"""The end of a generator: closing, and what is shared between threads or cannot be shared."""

from __future__ import annotations

import asyncio
import copy
import multiprocessing
import pickle
import shutil
import threading
import time
from pathlib import Path

import pytest
from ending_helpers import LONG, QUESTION, in_thread, of_the_sample, that_waits  # noqa: F401 - fixtures

from dmoe_export import Generator, RequestError


def mapped(folder: Path) -> list[str]:
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if str(folder.resolve()) in line]


@pytest.mark.parametrize("options", [{}, {"experts_per_layer": 8}], ids=["plain", "budget"])
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc")
def test_closing_frees_the_files(tiny_bundle, our_kernels, tmp_path, options):
    """Also while a stream is held, and with streams that were taken from."""
    folder = shutil.copytree(tiny_bundle.folder, tmp_path / "bundle")
    threads = threading.active_count()
    generator = Generator.open(folder, backend="onnxruntime", threads=1, **options)
    first, used = generator.stream([[1, 2, 3]], **LONG), list(generator.stream([[1, 2, 3]], max_new_tokens=4))
    assert next(first).token_ids and used[-1].finish_reason and mapped(folder)
    generator.close()
    generator.close()
    assert not mapped(folder) and threading.active_count() <= threads  # a worker of asyncio may just have ended
    for call in (lambda: next(first), lambda: generator.stream([[1]]), lambda: generator.generate([[1]]),
                 lambda: asyncio.run(anext(generator.astream([[1]])))):
        with pytest.raises(RequestError, match=r"^The generator of .*bundle was closed; open the bundle again.$"):
            call()
    with pytest.raises(RequestError, match=r"^Backend onnxruntime was closed; open the bundle again.$"):
        generator.backend.forward(*[None] * 2)


def test_with_closes_and_errors_pass(sample_bundle):
    with pytest.raises(ZeroDivisionError), Generator.open(sample_bundle.folder, verify="sizes") as generator:
        raise ZeroDivisionError
    with pytest.raises(RequestError, match="was closed"):
        generator.generate(QUESTION)


def test_closing_waits_for_a_forward_and_ends_the_answer(slow):
    join = in_thread(lambda: slow.generate(QUESTION, **LONG))
    assert slow.backend.began.wait(60)
    slow.backend._backend = Kept(slow.backend._backend)
    closing = in_thread(slow.close)
    time.sleep(0.05)
    assert not slow.backend._backend.closed
    slow.backend.turns.release(1000)
    closing()
    assert slow.backend._backend.closed and slow.backend.forwards == 1
    with pytest.raises(RequestError, match="was closed"):
        join()


class Kept:
    """A backend that other tests need, too."""

    def __init__(self, backend):
        self._backend, self.closed = backend, False

    def __getattr__(self, name):
        return getattr(self._backend, name)

    def close(self):
        self.closed = True


@pytest.mark.parametrize("path", [None, 5, b"bundle", {"a"}, ["bundle"], True])
def test_what_is_no_path(sample_bundle, path):
    with pytest.raises(RequestError, match=r"^path is .*, it must be a path\.$"):
        Generator.open(path)
    if path is not None:
        with pytest.raises(RequestError, match=r"^trusted_key is .*, it must be a path\.$"):
            Generator.open(sample_bundle.folder, trusted_key=path)
        with pytest.raises(RequestError, match=r"^expect_sha256 is .*, it must be text\.$"):
            Generator.open(sample_bundle.folder, expect_sha256=path)


def test_two_threads_may_take_from_one_stream(generator):
    free = [block.token_ids for block in generator.stream(QUESTION, **LONG)]
    stream, found = generator.stream(QUESTION, **LONG), []
    joins = [in_thread(lambda: [found.append(block.token_ids) for block in stream]) for _ in range(3)]
    for join in joins:
        join()
    assert sorted(found) == sorted(free)


def test_threads_share_a_budget(tiny_bundle, our_kernels):
    """Forwards take turns, so hits and misses are counted whole, and every answer is as it would be alone."""
    prompts = [[1, 2, 3], [4] * 9, [7] * 5, [9, 8]]
    with Generator.open(tiny_bundle.folder, backend="onnxruntime", threads=1, experts_per_layer=8,
                        expert_refresh_interval=2) as generator:
        alone = [generator.generate([p], max_new_tokens=24, eos_id=-1)[0].token_ids for p in prompts]
        before = generator.backend.statistics()
        joins = [in_thread(lambda p=p: [generator.generate([p], max_new_tokens=24, eos_id=-1)[0].token_ids
                                        for _ in range(4)]) for p in prompts]
        assert [join() for join in joins] == [[ids] * 4 for ids in alone]
        done = generator.backend.statistics().since(before)
    assert done.hits + done.misses == 4 * (before.hits + before.misses)


@pytest.mark.parametrize("make", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_generator_cannot_be_copied(generator, make):
    with pytest.raises(TypeError, match="cannot be pickled or copied; in each process, open the bundle with"):
        make(generator)


def test_a_pool_of_processes_says_so(generator):
    pool = multiprocessing.get_context("spawn").Pool(1)
    with pool, pytest.raises(TypeError, match="cannot be pickled or copied"):
        pool.apply(Generator.generate, (generator, QUESTION))
