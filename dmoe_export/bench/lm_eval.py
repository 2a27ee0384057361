"""A bundle as a model of lm-eval (EleutherAI's lm-evaluation-harness 0.4), for its tasks of likelihoods and answers.

    python -m dmoe_export.bench.lm_eval run --model dmoe-export --model_args bundle=sample.bundle --tasks …

is lm-eval's own command line with this model in its registry; a program gives `simple_evaluate(model=BundleLM(…))`.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from ..decoding.score_settings import SCORE_OPTIONS
from ..errors import MissingRequirementError, RequestError
from ..extras import pip_install
from ..generator import Generator
from ..guards.numerals import integer

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from tqdm import tqdm
except ModuleNotFoundError as missing:
    raise MissingRequirementError(f"The adapter for lm-eval needs {missing.name}; run: {pip_install('eval')}."
                                  ) from missing

_OPENING = inspect.signature(Generator.open).parameters.keys() - {"path", "progress"}
_ANSWER = 256  # tokens, where a task does not say: lm-eval's own default
_MANY = 256  # pairs that are scored in one call


class ChatContext(str):
    """Messages in JSON: text with control tokens would let documents spell them, as text never does here."""


@register_model("dmoe-export")
class BundleLM(TemplateLM):
    """`loglikelihood` by `Generator.score`, `generate_until` by `Generator.generate`."""

    def __init__(self, bundle: str | Path | Generator, batch_size: int | str = 8, device: str | None = None,
                 **options: Any) -> None:
        """`bundle`: a folder, a hub id, or what is open already.

        `options` (`--model_args`): those of `Generator.score`, but batch, which is `batch_size`; and of
        `Generator.open`, whose `backend` says where it runs: lm-eval gives a `device` whether one was asked for or not.
        Raises RequestError for others, and as these do.
        """
        super().__init__()
        unknown = options.keys() - (SCORE_OPTIONS.keys() - {"batch"}) - _OPENING
        if unknown:
            raise RequestError(f"Model dmoe-export of lm-eval has no option {', '.join(sorted(unknown))}; it takes "
                               "those of Generator.open and Generator.score, and batch_size.")
        opening = {name: value for name, value in options.items() if name in _OPENING}
        if isinstance(bundle, Generator):
            self.generator = bundle
        else:
            self.generator = Generator.open(bundle, **opening)
        self.options: Any = {name: value for name, value in options.items() if name in SCORE_OPTIONS}
        try:
            self.options["batch"] = integer(str(batch_size))
        except ValueError:
            raise RequestError(f"batch_size is {batch_size!r}, it must be a number of rows such as 8.") from None
        self.generator.score_all([], **self.options)  # refuses what makes no sense before any task is loaded

    @property
    def eot_token_id(self) -> int:
        """Stands before a text without context, too."""
        return self.generator.backend.description.eos_id

    @property
    def max_length(self) -> int:
        """Tokens of context and continuation together."""
        d, limits = self.generator.backend.description, self.generator.backend.limits
        return min([d.max_positions, *([limits.max_context] if limits and limits.max_context else [])])

    @property
    def tokenizer_name(self) -> str:
        """By which lm-eval knows requests that it has cached."""
        return str(self.generator.bundle.folder)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A context that is encoded by the bundle's template when it is asked about.

        Raises RequestError for a task that begins the model's answer (gen_prefix).
        """
        if not add_generation_prompt:
            raise RequestError("The task begins the answer itself (gen_prefix), and no chat context of model "
                               "dmoe-export can; leave --apply_chat_template out.")
        return ChatContext(json.dumps(chat_history))

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text as the tokenizer begins one; with False nothing is added."""
        text = self.generator.text
        if text is None:
            raise RequestError(f"{self.tokenizer_name} has no tokenizer for the texts of lm-eval; export the "
                               "checkpoint with its tokenizer.json.")
        return text.encode_literal(string) if add_special_tokens is False else text.encode_plain(string)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if not isinstance(context, ChatContext):
            pair: tuple[list[int], list[int]] = super()._encode_pair(context, continuation)
            return pair
        answer = self.tok_encode(continuation, add_special_tokens=False)
        assert self.generator.text is not None
        return self.generator.text.encode_chat(json.loads(context)), answer

    def _loglikelihood_tokens(self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
                              disable_tqdm: bool = False, **_: Any) -> list[tuple[float, bool]]:
        """Pairs of one context that follow each other are choices of one prompt."""
        found: list[tuple[float, bool]] = []
        with tqdm(total=len(requests), desc="Scoring", disable=disable_tqdm) as bar:
            for some in _pieces(requests, _MANY):
                questions = [(ids, [choice for _, _, choice in same]) for ids, same in
                             ((ids, list(same)) for ids, same in groupby(some, key=lambda one: one[1]))]
                scores = [one for same in self.generator.score_all(questions, **self.options) for one in same]
                for (texts, _, _), score in zip(some, scores, strict=True):
                    found.append((score.log_probability, score.is_greedy))
                    self.cache_hook.add_partial("loglikelihood", texts, found[-1])
                bar.update(len(some))
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, behind the end token; those longer than the model's positions in windows."""
        found = []
        for (text,) in tqdm([one.args for one in requests], desc="Scoring", disable=disable_tqdm):
            windows = get_rolling_token_windows(self.tok_encode(text, add_special_tokens=False), self.eot_token_id,
                                                self.max_length - 1, 1)
            pairs = [make_disjoint_window(window) for window in windows]
            scores = self.generator.score_all([(before, [ids]) for before, ids in pairs], **self.options)
            found.append(sum(score.log_probability for (score,) in scores))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), found[-1])
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers; other keywords of a task than lm-eval's own are options of `Generator.generate`."""
        found: dict[int, str] = {}
        asked = sorted(enumerate(one.args for one in requests), key=lambda one: (json.dumps(one[1][1], sort_keys=True),
                                                                               one[0]))
        with tqdm(total=len(requests), desc="Answering", disable=disable_tqdm) as bar:
            for _, same in groupby(asked, key=lambda one: one[1][1]):
                for some in _pieces(list(same), self.options["batch"]):
                    options = _options(some[0][1][1])
                    chat = isinstance(some[0][1][0], ChatContext)
                    prompts = [json.loads(context) if chat else context for _, (context, _) in some]
                    answers = self.generator.generate(prompts, chat=chat, **options)
                    for (number, args), answer in zip(some, answers, strict=True):
                        found[number] = answer.text or ""
                        self.cache_hook.add_partial("generate_until", args, found[number])
                    bar.update(len(some))
        return [found[number] for number in range(len(requests))]


def _options(asked: dict[str, Any]) -> dict[str, Any]:
    """lm-eval's keywords of an answer in terms of `Generator.generate`; without do_sample there is no chance in it."""
    options = dict(asked)
    until, sample = options.pop("until", None), options.pop("do_sample", "temperature" in options)
    options["stop"] = [until] if isinstance(until, str) else list(until or [])
    options["max_new_tokens"] = options.pop("max_gen_toks", options.get("max_new_tokens", _ANSWER))
    options["temperature"] = options.get("temperature", 1.0) if sample else 0.0
    return options


def _pieces(items: Sequence[Any], size: int) -> Iterable[Sequence[Any]]:
    return (items[start:start + size] for start in range(0, len(items), size))


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
