"""The public face at run time: open a bundle, generate, stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typing_extensions import Unpack

from .bundle.hub import resolve_bundle
from .bundle.reader import Bundle, Verify, open_bundle
from .decoding.limits import check_prompts
from .decoding.loop import BlockDiffusion
from .decoding.option import check_kind
from .decoding.routing import routing_inputs
from .decoding.row import FinishReason
from .decoding.settings import OPTIONS, DecodeSettings, GenerateOptions
from .decoding.telemetry import Statistics
from .errors import BundleError, RequestError
from .runtime.backend import Backend
from .runtime.choose import BACKENDS, BackendName, open_backend, open_under_budget
from .runtime.cpu.session import MOST_THREADS
from .runtime.residency.backend import ResidentBackend, parse_interval
from .runtime.residency.budget import plan_budget
from .text.codec import TextCodec, TextStream
from .text.prompts import Prompts, batch_of, encode


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
             expert_budget: str | int | None = None, experts_per_layer: int | None = None,
             expert_refresh_interval: str | int = "auto", verify: Verify = "full",
             expect_sha256: str | None = None, trusted_key: str | Path | None = None,
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
        if backend not in BACKENDS:
            raise RequestError(f"Backend {backend!r} is not known; known: {', '.join(BACKENDS)}.")
        if threads is not None:
            check_kind("threads", threads, int)
            if not 1 <= threads <= MOST_THREADS:
                raise RequestError(f"threads is {threads}, it must be between 1 and {MOST_THREADS}.")
        interval = parse_interval(expert_refresh_interval)
        bundle = open_bundle(resolve_bundle(path), verify, progress, expect_sha256=expect_sha256,
                             trusted_key=trusted_key)
        budget = plan_budget(bundle.manifest, expert_budget, experts_per_layer)
        if budget is None:
            return cls(bundle, *open_backend(bundle, backend, threads))
        return cls(bundle, *open_under_budget(bundle, budget, interval, backend, threads))

    def generate(self, prompts: Prompts, *, chat: bool = True,
                 **options: Unpack[GenerateOptions]) -> list[Generation]:
        """Answer one prompt or a batch of prompts; always a list, in the order of the prompts.

        A prompt is text, a list of chat messages (`{"role", "content"}`), or a list of token ids. Text is wrapped in
        the chat template unless `chat` is false. Raises RequestError for a bad prompt or option, NotFiniteError where
        the model computes NaN. In brackets the default of an option that is left out or None, where the bundle's
        `decode_defaults` have no other:

        max_new_tokens: Most tokens of the answer [at least 1; default: the bundle's, or 128].
        block_length: Tokens that are decoded together, as one block; only full-canvas models (LLaDA, Dream) take
            another than the bundle's [at least 1; default: the bundle's].
        steps: Most forward passes that fill one block; fewer is faster and keeps less certain tokens [at least 1;
            default: 32].
        cache: What is kept between forward passes, to save work: block (exact; for models whose blocks see no later
            ones), prefix or dual (for full-canvas models; dual keeps more, is faster and less exact; Fast-dLLM) or
            none; auto is block, or prefix for full-canvas models [default: auto].
        acceptance: Which tokens a step keeps: threshold (all that are probable enough), fixed (the same number in every
            step; LLaDA2), factor (the more, the surer the best are; Fast-dLLM), hierarchy (also the best of every gap;
            dInfer) or credit (sooner what was the best choice before; CreditDecoding) [default: threshold].
        threshold: Keep a token once its probability is above this; higher is slower and safer (acceptance threshold,
            hierarchy and credit) [between 0 and 1; default: 0.95].
        factor: Higher keeps more tokens in a step and is less safe (acceptance factor) [0 or more; default: 1.0].
        low_threshold: Keep the best token of a gap once its probability is above this; higher is slower and safer
            (acceptance hierarchy) [between 0 and 1; default: 0.4].
        credit_alpha: How much credit counts; higher keeps tokens sooner, 0 is off (acceptance credit) [0 or more;
            default: 0.7].
        credit_beta: Share of its credit that a token keeps from step to step; higher remembers longer (acceptance
            credit) [between 0 and 1; default: 0.8].
        credit_gamma: How fast credit falls with a token's probability; higher gives unsure tokens less (acceptance
            credit) [0 or more; default: 0.2].
        edit_threshold: Replace a token of the block by another whose probability is above this; lower replaces more
            (LLaDA2.1) [between 0 and 1; default: off].
        edit_passes: Most forward passes that only replace tokens, after a block is filled; more is slower [between 0
            and 1000; default: 16].
        salient_threshold: Recompute only tokens whose surroundings changed: those with a cosine to the step before
            below this, such as 0.99; higher is slower and closer to exact; needs a bundle exported with --salient
            (DyLLM) [above 0 and at most 2; default: off].
        full_steps: Full steps before the first salient one; more is slower and closer to exact [at least 1; default: 4;
            block-causal: 1 in every block].
        refresh_interval: Every so many salient steps one is full; smaller is slower and closer to exact [at least 1;
            default: never].
        salient_capacity: Recompute at most so many tokens per layer, with a graph of fixed sizes that the bundle was
            exported with [at least 1; default: the graph of any size].
        exact_first_layer: Let all tokens enter the first layer of a salient step; slower and closer to exact [default:
            off].
        temperature: How much chance there is in the choice of tokens; higher is more varied, 0 takes the most probable
            [0 or more; default: the bundle's, or 0.0].
        top_k: Choose among so many most probable tokens; higher is more varied, 0 is off [0 or more; default: the
            bundle's, or 0].
        top_p: Choose among the most probable tokens that reach this probability together; higher is more varied, 1 is
            off [above 0 and at most 1; default: the bundle's, or 1.0].
        seed: Start of the random numbers; row i of a batch draws with seed + i [0 or more; default: 0].
        eos_id: Token id that ends the answer, one or several; -1 for none [a token id, several of them, or -1 alone for
            none; default: the model's].
        early_stop: End as soon as an end token has no gap before it, else at the block's end; with editing always there
            [default: on].
        coreset_top_p: Share of a block's votes for experts that is followed; higher uses more experts and is slower
            (routing top_p; dMoE) [between 0 and 1; default: the bundle's].
        min_experts: Fewest experts of a block; higher is slower (routing top_p) [at least 1; default: the bundle's].
        coreset_size: Experts of a block; higher is slower and closer to each token's own choice (routing top_c;
            LLaDA2.2) [at least 1; default: the bundle's].
        """
        batch = batch_of(prompts)
        tokens: list[list[int]] = [[] for _ in batch]
        ends: dict[int, Generation] = {}
        for block in self.stream(batch, chat=chat, **options):
            tokens[block.index] += block.token_ids
            if block.finish_reason:
                ids = tokens[block.index]
                ends[block.index] = Generation(ids, self.text.decode(ids) if self.text else None, block.finish_reason,
                                               block.stats)
        return [ends[i] for i in range(len(batch))]

    def stream(self, prompts: Prompts, *, chat: bool = True,
               **options: Unpack[GenerateOptions]) -> Iterator[Block]:
        """Finished blocks as they come, `index` telling the prompt; arguments and errors as in `generate`."""
        settings, manifest, folder = self._settings(options), self.bundle.manifest, str(self.bundle.folder)
        encoded = [encode(prompt, chat, self.text, self.bundle.folder) for prompt in batch_of(prompts)]
        loop = BlockDiffusion(self.backend, settings, manifest.bytes_per_expert, manifest.precision, folder)
        check_prompts(encoded, settings.max_new_tokens, self.backend, folder)
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

    def _settings(self, options: GenerateOptions) -> DecodeSettings:
        unknown = options.keys() - OPTIONS.keys()
        if unknown:
            raise RequestError(f"Unknown generation option: {', '.join(sorted(unknown))}.")
        said = {name: value for name, value in options.items() if value is not None}
        return DecodeSettings(**self._defaults | said)


def _decode_defaults(bundle: Bundle) -> dict[str, Any]:
    """The bundle's decode defaults; raises BundleError for what no request could ask for."""
    manifest = bundle.manifest
    defaults: dict[str, Any] = dict(manifest.decode_defaults)
    unknown = defaults.keys() - OPTIONS.keys()
    wrong = f"{', '.join(sorted(unknown))} is no setting of a request." if unknown else ""
    try:
        if not unknown:
            routing_inputs(DecodeSettings(**defaults), manifest.routing.mode, manifest.model.moe)
    except RequestError as error:
        wrong = str(error)
    if wrong:
        raise BundleError(f"The decode_defaults of {bundle.folder} cannot be used; export again: {wrong}")
    return defaults
