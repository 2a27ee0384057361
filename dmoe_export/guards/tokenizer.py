"""Calls into the library `tokenizers` that end: its panics become sentences, and its searches a limit of time.

A panic of the library is an exception of its own that is no `Exception`; its own words go to standard error before it.
Regular expressions of a tokenizer.json can take any time, and cannot be stopped: such a call goes on in a thread that
nobody waits for, until the process ends.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from tokenizers import AddedToken, Encoding, Tokenizer

from ..errors import DmoeError, LengthError, RequestError
from .tokenizer_limits import check_tokenizer, has_pattern

SECONDS = 5.0  # for one call; 100 000 tokens take half a second
MOST_CHARACTERS = 10_000_000  # of a text
_MOST_MADE = 100_000_000  # characters that a normalizer may make of it

T = TypeVar("T")


class Slow(Exception):
    """A call took too long."""


@contextmanager
def no_panics(refuse: Callable[[str], DmoeError]) -> Iterator[None]:
    """Within it, whatever the library raises becomes `refuse(its words)`; errors of ours pass."""
    try:
        yield
    except (DmoeError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except Slow:
        raise refuse(f"it takes more than {SECONDS:g} s") from None
    except BaseException as error:  # tokenizers raises bare Exception, and pyo3's PanicException is none
        if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":
            raise
        raise refuse(" ".join(str(error).split()).rstrip(".")[:300] or type(error).__name__) from None


class GuardedTokenizer:
    """A tokenizer whose calls are bounded; `raw` is the library's, `content` what its file holds."""

    def __init__(self, content: Any) -> None:
        """`content`: what tokenizer.json holds. Raises ValueError, or what the library does; use `no_panics`."""
        self._growth = check_tokenizer(content)
        self.content = content
        added = content.get("added_tokens")
        self._try([token["content"] for token in added if isinstance(token, dict) and token.get("normalized")
                   and isinstance(token.get("content"), str)] if isinstance(added, list) else [])
        # Not the file's own text: where a name stands twice, the library could read another than was checked.
        self.raw = Tokenizer.from_str(json.dumps(content))
        self.raw.no_truncation()  # settings of training, not of prompts
        self.raw.no_padding()

    @property
    def most_characters(self) -> int:
        """Of a text that it takes."""
        return min(MOST_CHARACTERS, _MOST_MADE // self._growth)

    def encode(self, text: str, add_special_tokens: bool = False) -> Encoding:
        """The encoding of a text; raises RequestError where that does not work, or takes too long."""
        if len(text) > self.most_characters:
            raise LengthError(f"Prompt of {len(text)} characters is longer than the {self.most_characters} that its "
                              "tokenizer takes; give a shorter one.")
        with no_panics(lambda why: RequestError(f"The tokenizer cannot encode a prompt of {len(text)} characters: "
                                                f"{why}.")):
            batch = self.raw.encode_batch  # the one that leaves other threads running
            return within(lambda: batch([text], add_special_tokens=add_special_tokens))[0]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids without special tokens; raises RequestError as `encode` does."""
        with no_panics(lambda why: RequestError(f"The tokenizer cannot decode {len(ids)} token ids: {why}.")):
            batch = self.raw.decode_batch
            return str(within(lambda: batch([list(ids)], skip_special_tokens=True))[0])

    def add(self, tokens: Sequence[AddedToken]) -> None:
        """Add tokens; raises what the library does; use `no_panics`."""
        self._try([token.content for token in tokens if token.normalized])
        self.raw.add_tokens(list(tokens))

    def _try(self, texts: list[str]) -> None:
        """Normalise the contents of tokens as adding them will, which holds up all threads: here with a limit."""
        if not texts or not has_pattern(self.content.get("normalizer")):
            return
        bare = Tokenizer.from_str(json.dumps({
            "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "pre_tokenizer": None,
            "post_processor": None, "decoder": None, "normalizer": self.content["normalizer"],
            "model": {"type": "WordLevel", "vocab": {"?": 0}, "unk_token": "?"}}))
        within(lambda: bare.encode_batch(texts))


class _Worker:
    """A thread that does one job after another."""

    def __init__(self) -> None:
        self.jobs: SimpleQueue[Callable[[], Any]] = SimpleQueue()
        self.answers: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()
        threading.Thread(target=self._run, name="dmoe-export tokenizer", daemon=True).start()

    def _run(self) -> None:
        while True:
            job = self.jobs.get()
            try:
                self.answers.put((job(), None))
            except BaseException as error:  # a panic, too
                self.answers.put((None, error))


_idle: list[_Worker] = []
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_idle.clear)  # threads stay with the parent


_end: ContextVar[float | None] = ContextVar("when the calls of one request must have ended", default=None)


@contextmanager
def one_request() -> Iterator[None]:
    """Within it, all calls together have twice the time of one."""
    token = _end.set(time.monotonic() + 2 * SECONDS)
    try:
        yield
    finally:
        _end.reset(token)


def within(job: Callable[[], T]) -> T:
    """The job's answer or error, done in another thread; raises Slow where it takes more than SECONDS."""
    end = _end.get()
    seconds = SECONDS if end is None else min(SECONDS, max(0.0, end - time.monotonic()))
    try:
        worker = _idle.pop()
    except IndexError:
        worker = _Worker()
    worker.jobs.put(job)
    try:
        answer, error = worker.answers.get(timeout=seconds)
    except Empty:
        raise Slow from None  # nobody else gets this worker, whose answer is still to come; so after ctrl-C
    _idle.append(worker)
    if error is not None:
        raise error
    result: T = answer
    return result
