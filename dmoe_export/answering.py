"""How an open bundle is asked: whole answers, streams, and batches of requests that join."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from collections.abc import Generator as Results
from concurrent.futures import ThreadPoolExecutor
from weakref import WeakSet

from typing_extensions import Unpack

from .batch import Batch, Request
from .bundle.reader import Bundle
from .decoding.answer import Block, Generation, generation_of
from .decoding.defaults import Defaults
from .decoding.limits import check_batch, check_prompt
from .decoding.settings import OPTIONS, DecodeSettings, GenerateOptions
from .decoding.stream import Life, Stream
from .decoding.structured import barred_tokens
from .decoding.template import Part, template_of
from .decoding.way import Way
from .errors import RequestError
from .grammar.grammar import Grammar, Grammars
from .grammar.schema import regex_of_schema
from .runtime.backend import Backend
from .text.codec import TextCodec
from .text.prompts import Prompt, Prompts, batch_of, encode
from .text.switches import Switches
from .words import count


class Answering:
    """What a `Generator` does with prompts."""

    bundle: Bundle
    backend: Backend
    text: TextCodec | None
    defaults: Defaults
    _grammars: Grammars | None
    _life: Life
    _streams: WeakSet[Stream[Block]]

    def generate(self, prompts: Prompts, *, chat: bool = True, chat_template_kwargs: Switches | None = None,
                 template: Sequence[Part] | None = None, cancel: threading.Event | None = None,
                 **options: Unpack[GenerateOptions]) -> list[Generation]:
        """Answer one prompt or a batch of prompts; always a list, in the order of the prompts.

        A prompt is text, a list of chat messages (`{"role", "content"}`), or a list of token ids. Text is wrapped in
        the chat template unless `chat` is false; `chat_template_kwargs` are values that it reads by name, such as
        `{"enable_thinking": False}`: True, False, None or numbers, and `tools`, a list of dictionaries. `template` is
        what every answer is made of, and as long as: texts and token ids that are given, and gaps, which the model
        fills, such as `["def ", Gap(4), "(x):"]`. When `cancel` is set, by another thread, the answers end at the next
        look between forwards with finish_reason "cancelled". Raises RequestError for a bad prompt, template or option,
        and once the generator is closed; NotFiniteError where the model computes NaN. In brackets the default of an
        option that is left out or None, where neither the preset nor the bundle's `decode_defaults` have another:

        preset: Settings that the bundle has under this name, such as speed or quality; what else is asked for wins [a
            name of 1 to 100 characters, or off; default: the bundle's, or none].
        max_new_tokens: Most tokens of the answer [at least 1; default: the bundle's, or 128].
        block_length: Tokens that are decoded together, as one block; only full-canvas models (LLaDA, Dream) take
            another than the bundle's [at least 1; default: the bundle's].
        steps: Most forward passes that fill one block or canvas; fewer is faster and keeps less certain tokens [at
            least 1; default: the bundle's, or 32].
        cache: What is kept between forward passes, to save work: block (exact; for models whose blocks see no later
            ones), prefix or dual (for full-canvas models; dual keeps more, is faster and less exact; Fast-dLLM) or
            none; auto is block, or prefix for full-canvas models [default: auto].
        schedule: Which forward passes run with cache block: merged (a finished block, and the end of the prompt, enter
            the cache in the first pass over the next block: fewer passes, the same tokens) or reference (each in a pass
            of its own; salient steps and canvases always) [default: merged].
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
            (LLaDA2.1) [between 0 and 1, or off; default: off].
        edit_passes: Most forward passes that only replace tokens, after a block is filled; more is slower [between 0
            and 1000; default: 16].
        edit_blocks: Finished blocks before the one being decoded that stay open to editing and see it; more is slower
            and streams later; needs edit_threshold and a bundle exported with --multi-block-editing (LLaDA2.1) [between
            0 and 3; default: 0].
        penalty_lambda: Take this off the logit of the token before a place, so that tokens repeat less; 0 is off (with
            edit_threshold; LLaDA2.1) [0 or more; default: 0.0].
        insert_delete: Insert and delete tokens while editing; needs a model that was trained to and edit_threshold
            (LLaDA2.2) [default: off].
        salient_threshold: Recompute only tokens whose surroundings changed: those with a cosine to the step before
            below this, such as 0.99; higher is slower and closer to exact; needs a bundle exported with --salient
            (DyLLM) [above 0 and at most 2, or off; default: off].
        full_steps: Full steps before the first salient one; more is slower and closer to exact [at least 1; default: 4;
            block-causal: 1 in every block].
        refresh_interval: Every so many salient steps one is full; smaller is slower and closer to exact [at least 1, or
            off; default: never].
        salient_capacity: Recompute at most so many tokens per layer, with a graph of fixed sizes that the bundle was
            exported with [at least 1, or off; default: the graph of any size].
        exact_first_layer: Let all tokens enter layer 0 of a salient step; slower and closer to exact [default: off].
        temperature: How much chance there is in the choice of tokens; higher is more varied, 0 takes the most probable
            [0 or more; default: the bundle's, or 0.0].
        top_k: Choose among so many most probable tokens; higher is more varied, 0 is off [0 or more; default: the
            bundle's, or 0].
        top_p: Choose among the most probable tokens that reach this probability together; higher is more varied, 1 is
            off [above 0 and at most 1; default: the bundle's, or 1.0].
        entropy_bound: Keep the surest tokens of a step, as long as the entropies of those before sum to no more than
            this, in nats; higher keeps more and is less safe (canvas) [0 or more; default: the bundle's, or 0.1].
        t_max: Temperature of the first step, from which it falls linearly; higher is more varied (canvas) [0 or more;
            default: the bundle's, or 0.8].
        t_min: Temperature towards which it falls; the last step's is a little higher (canvas) [0 or more; default: the
            bundle's, or 0.4].
        stability_threshold: A canvas is finished once its most probable tokens were the same in so many steps before,
            and it is sure (confidence_threshold); higher is slower and safer (canvas) [0 or more; default: the
            bundle's, or 1].
        confidence_threshold: A canvas is sure while the mean entropy of its places is below this, in nats; higher ends
            sooner and is less safe, 0 runs all steps (canvas) [0 or more; default: the bundle's, or 0.005].
        seed: Start of the random numbers; row i of a batch draws with seed + i [0 or more; default: 0].
        eos_id: Token id that ends the answer, one or several; -1 for none [a token id, several of them, or -1 alone for
            none; default: the model's].
        early_stop: End as soon as an end token has no gap before it, else at the block's end; with editing and with a
            canvas always there [default: on].
        stop: Text that ends the answer, one or several: the answer's text ends before the first that is complete, and
            its block is the last [up to 16 texts of 1 to 1000 characters; an empty one alone for none; default: none].
        regex: Regular expression that the whole answer matches; where the shortest match is longer than max_new_tokens,
            the answer begins one [a text of 1 to 100000 characters, or off; default: none].
        json_schema: JSON schema that the whole answer is valid against; in place of regex [a JSON schema, as text or as
            a mapping, or off; default: none].
        time_limit: Most seconds of decoding, looked at between forwards; an answer then has the blocks that are
            finished [above 0, or off; default: none].
        logprobs: Give each token of the answer its log-probability, and so many of the most probable tokens beside it,
            at the step that kept it; slower, as all logits go to the host [between 0 and 20, or off; default: off].
        coreset_top_p: Share of a block's votes for experts that is followed; higher uses more experts and is slower
            (routing top_p; dMoE) [between 0 and 1; default: the bundle's].
        min_experts: Fewest experts of a block; higher is slower (routing top_p) [at least 1; default: the bundle's].
        coreset_size: Experts of a block; higher is slower and closer to each token's own choice (routing top_c;
            LLaDA2.2) [at least 1; default: the bundle's].
        """
        batch = batch_of(prompts)
        blocks: list[list[Block]] = [[] for _ in batch]
        for block in self.stream(batch, chat=chat, chat_template_kwargs=chat_template_kwargs, template=template,
                                 cancel=cancel, **options):
            blocks[block.index].append(block)
        return [generation_of(mine) for mine in blocks]

    def stream(self, prompts: Prompts, *, chat: bool = True, chat_template_kwargs: Switches | None = None,
               template: Sequence[Part] | None = None, cancel: threading.Event | None = None,
               **options: Unpack[GenerateOptions]) -> Stream[Block]:
        """Finished blocks as they come, `index` telling the prompt; arguments and errors as in `generate`.

        Nothing is decoded but while the next block is asked for. `Stream.cancel()` is another way to set `cancel`,
        `Stream.close()` ends it without more blocks.
        """
        self._life.check()
        way = self._way(options, template)
        requests = [self._request(prompt, chat, chat_template_kwargs, way, i)
                    for i, prompt in enumerate(batch_of(prompts))]
        return self._streamed(requests, cancel)

    async def astream(self, prompts: Prompts, *, chat: bool = True, chat_template_kwargs: Switches | None = None,
                      template: Sequence[Part] | None = None, cancel: threading.Event | None = None,
                      **options: Unpack[GenerateOptions]) -> AsyncIterator[Block]:
        """`stream` for asyncio: the loop is free while a thread of this call's own decodes.

        Errors come with the first block. Leaving the loop, or cancelling the task, ends the decoding at the next look
        between forwards.
        """
        loop, worker = asyncio.get_running_loop(), ThreadPoolExecutor(1, "dmoe-astream")
        stream: Stream[Block] | None = None
        try:
            stream = await loop.run_in_executor(
                worker, lambda: self.stream(prompts, chat=chat, chat_template_kwargs=chat_template_kwargs,
                                            template=template, cancel=cancel, **options))
            while (block := await loop.run_in_executor(worker, next, stream, None)) is not None:
                yield block
        finally:
            if stream:
                stream.cancel()
            worker.shutdown(wait=False)

    def request(self, prompt: Prompt, *, chat: bool = True, chat_template_kwargs: Switches | None = None,
                template: Sequence[Part] | None = None, **options: Unpack[GenerateOptions]) -> Request:
        """A prompt for `Batch.add`, encoded and checked: raises RequestError for what can never be answered."""
        self._life.check()
        return self._request(prompt, chat, chat_template_kwargs, self._way(options, template), 0)

    def batch(self, slots: int = 8, prefix_cache: str | int | None = None) -> Batch:
        """A batch of at most so many rows, which requests join and leave at any step; see `Batch`.

        `prefix_cache`: memory such as 512M or bytes for keys and values of finished blocks; a prompt that begins with
        the same blocks as an earlier one takes them from there, and its answer stays the same. None keeps nothing.
        Raises RequestError for more slots than an engine of the bundle takes rows, for a size that is none, and for a
        prefix cache of a model whose blocks see later ones.
        """
        self._life.check()
        return Batch(self.bundle, self.backend, self.text, slots, self._life.check, prefix_cache)

    def _streamed(self, requests: list[Request], cancel: threading.Event | None) -> Stream[Block]:
        check_batch(len(requests), self.backend, str(self.bundle.folder))
        stream = Stream(lambda asked: self._blocks(requests, asked), self._life, cancel)
        self._streams.add(stream)
        return stream

    def _blocks(self, requests: list[Request], asked: Callable[[], bool]) -> Results[Block, None, None]:
        batch = self.batch(len(requests))
        rows = [batch.add(request, i) for i, request in enumerate(requests)]
        while len(batch):
            if asked():
                for row in rows:
                    batch.cancel(row)
            events = batch.step()
            error = next((event.error for event in events if event.error), None)
            if error is not None:
                raise error
            for event in events:
                if event.block:
                    yield event.block

    def _request(self, prompt: Prompt, chat: bool, switches: Switches | None, way: Way, index: int) -> Request:
        ids, folder = encode(prompt, chat, self.text, self.bundle.folder, switches), str(self.bundle.folder)
        check_prompt(ids, way, self.backend, folder, index)
        return Request(ids, way)

    def _way(self, options: GenerateOptions, parts: Sequence[Part] | None = None) -> Way:
        unknown = options.keys() - OPTIONS.keys()
        if unknown:
            raise RequestError(f"Unknown generation option: {', '.join(sorted(unknown))}.")
        said = {name: value for name, value in options.items() if value is not None}
        settings = self.defaults.settings(said)
        if settings.stops and self.text is None:
            raise RequestError(f"{self.bundle.folder} has no tokenizer to find a stop string in; leave stop out.")
        template = None if parts is None else template_of(parts, self._literal)
        if template and "max_new_tokens" in said and len(template.token_ids) > settings.max_new_tokens:
            raise RequestError(f"The template has {count(len(template.token_ids), 'place')}, more than max_new_tokens "
                               f"{settings.max_new_tokens}; leave max_new_tokens out.")
        return Way(self.backend, settings, self.bundle.manifest.precision, str(self.bundle.folder), template,
                   self._grammar(settings))

    def _grammar(self, settings: DecodeSettings) -> Grammar | None:
        """What the answer must match; None where it need not, or without a tokenizer, which `Way` refuses."""
        if not settings.structured or self._grammars is None:
            return None
        d = self.bundle.manifest.model
        schema = settings.json_schema
        regex = settings.regex or "" if schema is None else regex_of_schema(schema)
        ends = d.eos_ids if settings.eos_ids is None else settings.eos_ids
        return self._grammars.of(regex, (*barred_tokens(d), *ends))

    def _literal(self, text: str) -> list[int]:
        if self.text is None:
            raise RequestError(f"{self.bundle.folder} has no tokenizer for the text of a template; give token ids.")
        return self.text.encode_literal(text)
