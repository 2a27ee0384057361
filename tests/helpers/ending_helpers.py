"""What tests of ending need: a generator, one whose forwards wait to be let, and work in another thread."""

from __future__ import annotations

import threading

import pytest

from dmoe_export import Generator
from dmoe_export.runtime.backend import ForwardInputs

QUESTION = "what is 2 plus 3?"
LONG = {"max_new_tokens": 160, "eos_id": -1}


class Slow:
    """Another backend, that waits before a forward until it is let."""

    def __init__(self, backend):
        self._backend, self.turns, self.began = backend, threading.Semaphore(0), threading.Event()
        self.forwards, self.free = 0, False

    def __getattr__(self, name):
        return getattr(self._backend, name)

    def forward(self, inputs: ForwardInputs, cache):
        self.began.set()
        assert self.free or self.turns.acquire(timeout=60)
        self.forwards += 1
        return self._backend.forward(inputs, cache)


@pytest.fixture(scope="module", name="generator")
def of_the_sample(sample_bundle):
    with Generator.open(sample_bundle.folder, backend="onnxruntime", threads=1) as generator:
        yield generator


@pytest.fixture(name="slow")
def that_waits(generator):
    backend = Slow(generator.backend)
    yield Generator(generator.bundle, backend)
    backend.free = True
    backend.turns.release(1000)


def in_thread(work):
    """Run it; join() gives its result or raises its error."""
    found = []

    def call():
        try:
            found.append(work())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()

    def join():
        thread.join(60)
        assert not thread.is_alive()
        if isinstance(found[0], BaseException):
            raise found[0]
        return found[0]
    return join
