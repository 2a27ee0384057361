"""The public face at run time: open a bundle, generate, stream."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import NoReturn
from weakref import WeakSet

from .bundle.reader import Bundle, Verify
from .decoding.answer import Block, Generation
from .decoding.defaults import Defaults
from .decoding.stream import Life, Stream
from .filling import Filling
from .grammar.grammar import Grammars
from .grammar.vocabulary import vocabulary_of
from .opening import open_model
from .runtime.backend import Backend
from .runtime.choose import BackendName
from .runtime.cpu.products import Products
from .scoring import Scoring
from .text.codec import TextCodec

__all__ = ["Block", "Generation", "Generator"]


class Generator(Filling, Scoring):
    """A loaded bundle that answers prompts, until it is closed.

    >>> with Generator.open("sample.bundle") as generator:
    ...     generator.generate("what is 2 plus 3?", max_new_tokens=32)[0].text
    '2 + 3 = 5'

    Threads may share one: each answer is as it would be alone (forwards take turns on a GPU and under an expert budget,
    whose statistics then count all of them). Processes may not: it cannot be pickled, so open the bundle in each.
    """

    def __init__(self, bundle: Bundle, backend: Backend, backend_choice: str = "as given",
                 preset: str | None = None) -> None:
        """`backend_choice`: why it is this backend, in a few words. `preset`: as in `open`."""
        self.bundle, self.backend, self.backend_choice = bundle, backend, backend_choice
        self.text = TextCodec.of(bundle)
        self._grammars = None if self.text is None else Grammars(partial(
            vocabulary_of, self.text, bundle.manifest.model.vocab_size))
        self._life, self._streams = Life(str(bundle.folder)), WeakSet[Stream[Block]]()
        self.defaults = Defaults(bundle, preset)

    @classmethod
    def open(cls, path: str | Path, *, backend: BackendName = "auto", threads: int | None = None,
             expert_budget: str | int | None = None, experts_per_layer: int | None = None,
             expert_refresh_interval: str | int = "auto", cpu_products: Products = "exact", preset: str | None = None,
             verify: Verify = "full", expect_sha256: str | None = None, trusted_key: str | Path | None = None,
             progress: Callable[[int], None] | None = None) -> Generator:
        """Open and verify a bundle: a folder, or the hub id (`org/name`) of one, which is fetched first.

        In brackets what None or a keyword that is left out means:

        backend: What runs the bundle; auto: an engine of the bundle that fits this machine (tensorrt), else ONNX
            Runtime on the GPU (onnxruntime-cuda), else on the CPU (onnxruntime) [default: auto].
        threads: Threads per operator on the CPU [between 1 and 8 per CPU; default: ONNX Runtime's choice].
        expert_budget: Memory for experts, such as 4G, 25% or bytes; the others wait on disk (CPU) or in host memory
            (TensorRT engine built with --experts resident) [default: all].
        experts_per_layer: The same, as experts kept per layer [at least 1; default: all].
        expert_refresh_interval: Denoise steps between changes of the experts kept: auto, never or a number [default:
            auto].
        cpu_products: What weights are multiplied with on the CPU: exact (float32) or fast (integers for int8 and int4,
            bfloat16 for bf16, where the processor has them; rounds activations) [default: exact].
        preset: Settings that the bundle has under this name, such as speed or quality; what else is asked for wins [a
            name of 1 to 100 characters, or off; default: the bundle's, or none].
        verify: What is compared with the manifest before use: full (sizes and hashes) or sizes [default: full].
        expect_sha256: Use the bundle only if its manifest has this sha256, as export and inspect print it [default:
            any].
        trusted_key: Use the bundle only if manifest.json.sig is a signature by this Ed25519 public key in PEM [default:
            any].
        progress: As in `open_bundle`.

        `backend_choice` then says why it is this backend; a name other than auto means that backend or an error.
        Raises BundleError for a bad bundle, RequestError for a bad keyword, MissingRequirementError when this machine
        cannot run it.
        """
        opened = open_model(
            path, backend=backend, threads=threads, expert_budget=expert_budget, experts_per_layer=experts_per_layer,
            expert_refresh_interval=expert_refresh_interval, cpu_products=cpu_products, preset=preset, verify=verify,
            expect_sha256=expect_sha256, trusted_key=trusted_key, progress=progress)
        return cls(*opened, preset)

    def __enter__(self) -> Generator:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Free what the backend holds, such as mapped files and memory of a GPU; waits for a forward in progress.

        What is still being decoded, and every later request, raises RequestError. Closing again does nothing.
        """
        self._life.end()
        for stream in list(self._streams):
            stream.close()
        self.backend.close()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Neither pickle nor copy."""
        raise TypeError("A Generator holds an open model, so it cannot be pickled or copied; in each process, open the "
                        f"bundle with Generator.open({str(self.bundle.folder)!r}).")
