"""Scoring: how probable given answers are, for choosing among them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from collections.abc import Generator as Results
from itertools import islice
from typing import Any

from typing_extensions import Unpack

from .answering import Answering
from .decoding.option import check_kind
from .decoding.score import Score, Scorer
from .decoding.score_settings import ROUTING, SCORE_OPTIONS, ScoreOptions, ScoreSettings
from .decoding.stream import Stream
from .errors import RequestError
from .text.prompts import Prompt, encode
from .text.switches import Switches

Choice = str | Sequence[int]
"""A given answer: text, of which control tokens are plain characters and to which nothing is added, or token ids."""
Question = tuple[Prompt, Sequence[Choice]]


class Scoring(Answering):
    """What a `Generator` does with given answers."""

    def score(self, prompt: Prompt, choices: Sequence[Choice], *, chat: bool = True,
              chat_template_kwargs: Switches | None = None, cancel: threading.Event | None = None,
              **options: Unpack[ScoreOptions]) -> list[Score]:
        """The log-probability of each choice as the answer to a prompt, in nats and in the order of the choices.

        >>> scores = generator.score("what is 2 plus 3?", ["2 + 3 = 5", "2 + 3 = 6"])
        >>> max(scores, key=lambda score: score.log_probability).token_ids

        A prompt is as in `generate`. A choice is text, encoded literally, or token ids. p is over all tokens but the
        mask, with float64 sums of the model's float32 logits. one_pass: Σ ln p(x_i | prompt, all places of the choice
        masked). monte_carlo: l uniform over the L places, l random ones masked, the mean of (L / l) Σ ln p of these, a
        lower bound (LLaDA, arXiv 2502.09992, equation 6). Where blocks see no later ones, both are sums over the blocks
        that the choice touches, each behind the true tokens of those before it and masked up to its end. Routing is as
        in `generate`, with the preset that the bundle was opened with. When `cancel` is set, by another thread, it
        raises at the next look between forwards.

        Raises RequestError for a bad prompt, choice or option, for a model without masks (a canvas of random tokens),
        when it is cancelled, and once the generator is closed; NotFiniteError where the model computes NaN. In brackets
        the default of an option that is left out or None:

        estimator: How a choice's log-probability is estimated: one_pass (all its places masked, in one forward pass;
            LLaDA2 and its like: one for each block) or monte_carlo (mean over random sets of masked places, a lower
            bound; LLaDA) [default: one_pass].
        samples: Sets of masked places that are drawn for each block of a choice; where there are no more than that, all
            are computed and there is no chance in it (monte_carlo) [between 1 and 65536; default: 128].
        end: The model's end token is a part of each choice: that the answer ends there counts, too [default: off].
        seed: Start of the random numbers (monte_carlo) [0 or more; default: 0].
        batch: Most rows of a forward pass; more takes more memory and changes no score [between 1 and 1024; default:
            8].
        coreset_top_p: Share of a block's votes for experts that is followed; higher uses more experts and is slower
            (routing top_p; dMoE) [between 0 and 1; default: the bundle's].
        min_experts: Fewest experts of a block; higher is slower (routing top_p) [at least 1; default: the bundle's].
        coreset_size: Experts of a block; higher is slower and closer to each token's own choice (routing top_c;
            LLaDA2.2) [at least 1; default: the bundle's].
        """
        return self.score_all([(prompt, choices)], chat=chat, chat_template_kwargs=chat_template_kwargs, cancel=cancel,
                              **options)[0]

    def score_all(self, questions: Sequence[Question], *, chat: bool = True,
                  chat_template_kwargs: Switches | None = None, cancel: threading.Event | None = None,
                  **options: Unpack[ScoreOptions]) -> list[list[Score]]:
        """`score` of many (prompt, choices), whose forwards they share; a list of scores for each, in their order.

        Arguments, options and errors as there. Of `batch` neighbours, those of one prompt cost its prefill once.
        """
        self._life.check()
        scorer = Scorer(self.backend, self._score_settings(options), self.bundle.manifest.precision,
                        str(self.bundle.folder))
        ends = [self.backend.description.eos_id] if options.get("end") else []
        asked = []
        for i, (prompt, choices) in enumerate(questions):
            ids = encode(prompt, chat, self.text, self.bundle.folder, chat_template_kwargs)
            listed = [[*self._choice(one), *ends] for one in _listed(choices)]
            scorer.check(ids, listed, i)
            asked.append((ids, listed))
        pairs = [(ids, choice) for ids, listed in asked for choice in listed]

        def found(stop: Callable[[], bool]) -> Results[Score, None, None]:
            yield from scorer.scores(pairs, stop)

        stream: Stream[Any] = Stream(found, self._life, cancel)
        self._streams.add(stream)
        return [list(islice(stream, len(listed))) for _, listed in asked]

    def _score_settings(self, options: ScoreOptions) -> ScoreSettings:
        unknown = options.keys() - SCORE_OPTIONS.keys()
        if unknown:
            raise RequestError(f"Unknown scoring option: {', '.join(sorted(unknown))}.")
        said: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        of_preset = self.defaults.settings({name: said[name] for name in ROUTING if name in said})
        return ScoreSettings(**{**said, **{name: getattr(of_preset, name) for name in ROUTING}})

    def _choice(self, choice: Any) -> list[int]:
        if isinstance(choice, str):
            if self.text is None:
                raise RequestError(f"{self.bundle.folder} has no tokenizer for the text of a choice; give token ids.")
            return self.text.encode_literal(choice)
        if not _is_list(choice):
            raise RequestError(f"A choice is {repr(choice)[:100]}, it must be text or a list of token ids.")
        for token in choice:
            check_kind("A token id of a choice", token, int)
        return [int(token) for token in choice]


def _listed(choices: Any) -> list[Any]:
    if not _is_list(choices):
        raise RequestError(f"The choices are {repr(choices)[:100]}, they must be a list of texts or of lists of token "
                           'ids, such as ["yes", "no"].')
    if not len(choices):
        raise RequestError("No choice was given; give at least one.")
    return list(choices)


def _is_list(value: Any) -> bool:
    return hasattr(value, "__len__") and hasattr(value, "__iter__") and not isinstance(value, (str, bytes, dict))
