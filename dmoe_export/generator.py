"""The public face at run time: open a bundle, generate, stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from numbers import Integral
from pathlib import Path
from typing import Any

from .bundle.hub import resolve_bundle
from .bundle.reader import Bundle, Verify, open_bundle
from .decoding.loop import BlockDiffusion
from .decoding.row import FinishReason
from .decoding.settings import DecodeSettings, check_kind
from .decoding.telemetry import Statistics
from .description import RUNTIME_SETTINGS
from .errors import BundleError, RequestError
from .runtime.backend import Backend, Limits
from .runtime.choose import BACKENDS, BackendName, open_backend, open_under_budget
from .runtime.residency.backend import ResidentBackend, parse_interval
from .runtime.residency.budget import plan_budget
from .text.codec import Message, TextCodec, TextStream

Prompt = str | Sequence[int] | Sequence[Message]
_MOST_THREADS = 1024  # ONNX Runtime starts as many as it is told, whatever becomes of the machine
_PROMPT = "neither text, nor token ids, nor chat messages"


@dataclass(frozen=True)
class Generation:
    """The answer to one prompt: without the prompt, without the EOS."""

    token_ids: list[int]
    text: str | None
    finish_reason: FinishReason
    stats: Statistics

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"token_ids": self.token_ids, "text": self.text, "finish_reason": self.finish_reason,
                "stats": self.stats.as_dict()}


@dataclass(frozen=True)
class Block:
    """A finished block of one prompt's answer, as `stream` yields them."""

    index: int
    token_ids: list[int]
    text: str | None
    finish_reason: FinishReason | None
    stats: Statistics


class Generator:
    """A loaded bundle that answers prompts.

    >>> Generator.open("bundle").generate(["what is 2 plus 3 ?"], max_new_tokens=32)[0].text
    """

    def __init__(self, bundle: Bundle, backend: Backend, backend_choice: str = "as given") -> None:
        """`backend_choice`: why it is this backend, in a few words."""
        self.bundle, self.backend, self.backend_choice = bundle, backend, backend_choice
        self.text = TextCodec.of(bundle)
        self._defaults = _decode_defaults(bundle)

    @classmethod
    def open(cls, path: str | Path, *, backend: BackendName = "auto", threads: int | None = None,
             verify: Verify = "full", progress: Callable[[int], None] | None = None,
             expert_budget: str | int | None = None, experts_per_layer: int | None = None,
             expert_refresh_interval: str | int = "auto") -> Generator:
        """Open and verify a bundle: a folder, or the hub id (`org/name`) of one, which is fetched first.

        `backend` "auto" takes an engine of the bundle that fits this machine ("tensorrt"), else ONNX Runtime on the
        GPU ("onnxruntime-cuda"), else on the CPU ("onnxruntime"), and says why in `backend_choice`; any other name
        means that backend or an error. `threads` is for the CPU. `verify`, `progress` as in `open_bundle`.
        `expert_budget` ("4G", "25%", bytes) or `experts_per_layer` bounds the memory of experts (docs/residency.md:
        on the device with "tensorrt" and an engine built with --experts resident, else on the CPU),
        `expert_refresh_interval` is "auto", "never" or a number of denoise steps. Raises BundleError for a bad bundle,
        RequestError for a bad budget, MissingRequirementError when this machine cannot run it.
        """
        if backend not in BACKENDS:
            raise RequestError(f"Backend {backend!r} is not known; known: {', '.join(BACKENDS)}.")
        if threads is not None:
            check_kind("threads", threads, "int")
            if not 1 <= threads <= _MOST_THREADS:
                raise RequestError(f"threads is {threads}, it must be between 1 and {_MOST_THREADS}.")
        interval = parse_interval(expert_refresh_interval)
        bundle = open_bundle(resolve_bundle(path), verify, progress)
        budget = plan_budget(bundle.manifest, expert_budget, experts_per_layer)
        if budget is None:
            return cls(bundle, *open_backend(bundle, backend, threads))
        return cls(bundle, *open_under_budget(bundle, budget, interval, backend, threads))

    def generate(self, prompts: Prompt | Sequence[Prompt], *, chat: bool = True, **options: Any) -> list[Generation]:
        """Answer one prompt or a batch of prompts; always a list, in the order of the prompts.

        A prompt is text, a list of chat messages (`{"role", "content"}`), or a list of token ids. Text is wrapped in
        the chat template unless `chat` is false. `options`: the fields of `DecodeSettings` (max_new_tokens, cache,
        acceptance, threshold, steps, temperature, seed, …) and the run-time routing settings `coreset_top_p`,
        `min_experts`, `coreset_size`. What is left out or None is as the bundle's `decode_defaults` say, else as in
        `DecodeSettings`.
        """
        batch = self._batch(prompts)
        tokens: list[list[int]] = [[] for _ in batch]
        ends: dict[int, Generation] = {}
        for block in self.stream(batch, chat=chat, **options):
            tokens[block.index] += block.token_ids
            if block.finish_reason:
                ids = tokens[block.index]
                ends[block.index] = Generation(ids, self.text.decode(ids) if self.text else None, block.finish_reason,
                                               block.stats)
        return [ends[i] for i in range(len(batch))]

    def stream(self, prompts: Prompt | Sequence[Prompt], *, chat: bool = True, **options: Any) -> Iterator[Block]:
        """Finished blocks as they come, `index` telling the prompt; arguments and errors as in `generate`."""
        settings = self._settings(options)
        encoded = [self._encode(prompt, chat) for prompt in self._batch(prompts)]
        manifest = self.bundle.manifest
        loop = BlockDiffusion(self.backend, settings, manifest.bytes_per_expert, manifest.precision)
        for number, ids in enumerate(encoded):
            self._check(number, ids, settings)
        loop.check(encoded)
        return self._blocks(encoded, loop)

    def _blocks(self, encoded: list[list[int]], loop: BlockDiffusion) -> Iterator[Block]:
        texts = [TextStream(self.text) for _ in encoded] if self.text else None
        resident = self.backend if isinstance(self.backend, ResidentBackend) else None
        start = resident.statistics() if resident else None
        for block in loop.decode(encoded):
            if resident and start and block.finish_reason:
                block.statistics.residency = resident.statistics().since(start).as_dict()
            text = texts[block.index].push(block.token_ids, block.finish_reason is not None) if texts else None
            yield Block(block.index, block.token_ids, text, block.finish_reason, block.statistics)

    def _batch(self, prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
        """One prompt or many → many."""
        if not _is_list(prompts) and not isinstance(prompts, str):
            raise RequestError(f"Prompts {prompts!r} are {_PROMPT}, nor a list of them.")
        if isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], (Integral, dict))):
            return [prompts]  # type: ignore[list-item]
        if not len(prompts):
            raise RequestError("No prompt was given; give at least one.")
        return list(prompts)  # type: ignore[arg-type]

    def _settings(self, options: dict[str, Any]) -> DecodeSettings:
        options = dict(options)
        routing = self.backend.routing
        chosen: dict[str, float | int] = {}
        moe = self.backend.description.moe
        experts, fewest = (moe.num_experts, moe.experts_per_token) if moe else (0, 0)
        for option, name, kind, low, high in (("coreset_top_p", "top_p", "float", 0, 1),
                                              ("min_experts", "min_experts", "int", 1, experts),
                                              ("coreset_size", "coreset_size", "int", fewest, experts)):
            value = options.pop(option, None)
            if value is None:
                continue
            if name not in RUNTIME_SETTINGS[routing.mode]:
                raise RequestError(f"{option} has no meaning in this bundle: " + (
                    f"its routing mode is {routing.mode}." if moe else "its model is dense."))
            check_kind(option, value, kind)
            if not low <= value <= high:
                raise RequestError(f"{option} is {value}, it must be between {low} and {high}.")
            chosen[name] = value
        unknown = options.keys() - {one.name for one in fields(DecodeSettings)} | options.keys() & {"routing"}
        if unknown:
            raise RequestError(f"Unknown generation option: {', '.join(sorted(unknown))}.")
        said = {name: value for name, value in options.items() if value is not None}
        return DecodeSettings(routing=chosen, **self._defaults | said)

    def _encode(self, prompt: Prompt, chat: bool) -> list[int]:
        if not _is_list(prompt) and not isinstance(prompt, str):
            raise RequestError(f"Prompt {prompt!r} is {_PROMPT}.")
        if not isinstance(prompt, str) and len(prompt) and not isinstance(prompt[0], dict):
            wrong = next((i for i in prompt if not isinstance(i, Integral)), None)
            if wrong is not None:
                raise RequestError(f"Prompt with {wrong!r} is {_PROMPT}.")
            return [int(i) for i in prompt]  # type: ignore[arg-type]
        if not prompt or (isinstance(prompt, str) and not prompt.strip()):
            return []
        if self.text is None:
            raise RequestError(f"{self.bundle.folder} has no tokenizer; give token ids (--prompt-ids).")
        if isinstance(prompt, str):
            return self.text.encode_chat([{"role": "user", "content": prompt}]) if chat else (
                self.text.encode_plain(prompt))
        return self.text.encode_chat(list(prompt))  # type: ignore[arg-type]

    def _check(self, number: int, ids: list[int], settings: DecodeSettings) -> None:
        d = self.backend.description
        if not ids:
            raise RequestError(f"Prompt {number} is empty; give at least one token.")
        bad = next((i for i in ids if not 0 <= i < d.vocab_size), None)
        if bad is not None:
            raise RequestError(f"Prompt {number} holds token id {bad}, outside the vocabulary 0 … {d.vocab_size - 1}.")
        total = len(ids) + settings.max_new_tokens
        if total > d.max_positions:
            raise RequestError(f"Prompt {number} of {len(ids)} tokens and {settings.max_new_tokens} new ones need "
                               f"{total} positions, the model has {d.max_positions}; shorten one of them.")
        most = (self.backend.limits or Limits()).max_context
        if most is not None and total > most:
            raise RequestError(f"Prompt {number} of {len(ids)} tokens and {settings.max_new_tokens} new ones need a "
                               f"context of {total} tokens, the engine was built for {most}; build one with: "
                               f"dmoe-export build {self.bundle.folder} --max-context {total}.")
        beyond = next((i for i in settings.eos_ids or () if i >= d.vocab_size), None)
        if beyond is not None:
            raise RequestError(f"eos_id {beyond} is outside the vocabulary 0 … {d.vocab_size - 1}.")


def _decode_defaults(bundle: Bundle) -> dict[str, Any]:
    """The bundle's decode defaults; raises BundleError for what no request could ask for."""
    defaults: dict[str, Any] = dict(bundle.manifest.decode_defaults)
    unknown = defaults.keys() - {one.name for one in fields(DecodeSettings)} | defaults.keys() & {"routing"}
    wrong = f"{', '.join(sorted(unknown))} is no setting of a request." if unknown else ""
    try:
        if not unknown:
            DecodeSettings(**defaults)
    except RequestError as error:
        wrong = str(error)
    if wrong:
        raise BundleError(f"The decode_defaults of {bundle.folder} cannot be used; export again: {wrong}")
    return defaults


def _is_list(value: object) -> bool:
    """Whether it has a length and an order: lists, tuples, arrays, ranges; no bytes, whose items only look like ids."""
    return hasattr(value, "__getitem__") and hasattr(value, "__len__") and not isinstance(value, (dict, bytes, str))
