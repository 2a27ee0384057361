"""Decoding settings compared in one process: cache × schedule × acceptance × salient steps over the same prompts.

Every setting is one `generate` call per prompt and round; rounds go over all settings in turn, so that a machine that
slows down slows all of them. Figures are medians over rounds. Agreement is with the setting's own baseline: the same
acceptance without a cache (`none`) and without salient steps; `over_reference` is against the schedule `reference`.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from pydantic import Field

from ..description import Frozen
from ..errors import RequestError
from ..generator import Generation, Generator
from ..guards.numerals import integer, real
from ..text.prompts import Prompt
from .record import Spread

Key = tuple[str, str, str, str]


@dataclass(frozen=True)
class Question:
    """A prompt, and the text or token ids that would be right."""

    prompt: Prompt
    answer: str | None = None


@dataclass(frozen=True)
class Setting:
    """One combination; `options` are those of `Generator.generate`."""

    cache: str
    acceptance: str
    salient: str
    schedule: str
    options: dict[str, Any]


class SettingResult(Frozen):
    """What one setting did. Means are over prompts, times are sums over prompts of medians over rounds."""

    cache: str
    acceptance: str
    salient: str
    schedule: str = "reference"  # of results before it was an option
    refused: str | None = Field(None, description="why the model does not take this combination; the rest is then 0")
    tokens: int = 0
    seconds: float = 0.0
    spread: float = Field(0.0, description="(slowest − fastest round) / median")
    tokens_per_second: float = 0.0
    speedup: float | None = Field(None, description="baseline's seconds / these seconds; null without a baseline")
    over_reference: Spread | None = Field(None, description="seconds of schedule reference / these seconds, of the "
                                          "same rounds; null for it and without it")
    as_reference: float | None = Field(None, description="share of prompts with exactly its tokens")
    forwards: float = Field(0.0, description="model forwards (NFE)")
    executed_forwards: float = Field(0.0, description="forwards that ran")
    tokens_per_forward: float = Field(0.0, description="per model forward")
    unique_experts: float = Field(0.0, description="mean over MoE layers and denoise forwards")
    salient_rows: float | None = Field(None, description="mean over layers and sparse steps; null without sparse steps")
    agreement: float | None = Field(None, description="share of the baseline's tokens that are the same")
    same_answers: float | None = Field(None, description="share of prompts with the baseline's answer")
    accuracy: float | None = Field(None, description="share of right answers; null without answers")


class DecodeBench(Frozen):
    """All settings of one run."""

    prompts: int
    prompt_tokens: list[int] = Field(description="least and most")
    max_new_tokens: int
    rounds: int
    results: list[SettingResult]


def settings(caches: Sequence[str], acceptances: Sequence[str], salients: Sequence[str], schedules: Sequence[str],
             common: dict[str, Any]) -> list[Setting]:
    """Every combination. An acceptance is `name` or `name:value`, a salient setting `off` or a threshold."""
    return [Setting(cache, acceptance, salient, schedule, {**common, "cache": cache, "schedule": schedule,
                                                           **_acceptance(acceptance), **_salient(salient)})
            for acceptance, cache, salient, schedule in itertools.product(acceptances, caches, salients, schedules)]


def _acceptance(text: str) -> dict[str, Any]:
    """`threshold:0.9` → the options of generate; the value belongs to the rule's first parameter."""
    name, _, value = text.partition(":")
    chosen: dict[str, Any] = {"acceptance": name}
    if value:
        parameter = {"threshold": "threshold", "factor": "factor", "fixed": "steps", "hierarchy": "threshold",
                     "credit": "threshold"}.get(name)
        if parameter is None:
            raise RequestError(f"Acceptance {text!r} is not known; give a name such as threshold:0.9 or factor:1.")
        chosen[parameter] = _number(text, value, integer if parameter == "steps" else real)
    return chosen


def _salient(text: str) -> dict[str, Any]:
    return {} if text == "off" else {"salient_threshold": _number(text, text, real)}


def _number(text: str, value: str, kind: Callable[[str], Any]) -> Any:
    try:
        return kind(value)
    except ValueError:
        raise RequestError(f"{text!r} holds {value!r}, which is no number.") from None


def run(generator: Generator, questions: Sequence[Question], chosen: Sequence[Setting], rounds: int,
        advance: Callable[[str], None] = lambda what: None) -> DecodeBench:
    """Measure all settings; `advance` hears of every finished prompt.

    A combination that the model refuses is in the result, with its reason. Raises RequestError when all are refused.
    """
    refused: dict[Key, str] = {}
    answers: dict[Key, list[Generation]] = {}
    seconds: dict[Key, list[float]] = {}
    for turn in range(-1, rounds):  # turn −1 warms up on a few tokens, and finds out what is refused
        for setting in chosen:
            key = _key(setting)
            if key in refused:
                continue
            try:
                if turn < 0:
                    few = {**setting.options, "max_new_tokens": min(4, setting.options["max_new_tokens"])}
                    _answer(generator, questions[:1], replace(setting, options=few), advance)
                    continue
                results, elapsed = _answer(generator, questions, setting, advance)
            except RequestError as error:
                refused[key] = str(error)
                continue
            answers[key] = results
            seconds.setdefault(key, []).append(elapsed)
    if len(refused) == len({_key(setting) for setting in chosen}):
        raise RequestError(f"No setting of this comparison fits the bundle; the first reason: "
                           f"{next(iter(refused.values()))}")
    lengths = [generation.stats.prompt_tokens for generation in next(iter(answers.values()))]
    return DecodeBench(
        prompts=len(questions), prompt_tokens=[min(lengths), max(lengths)],
        max_new_tokens=chosen[0].options["max_new_tokens"], rounds=rounds,
        results=[_result(setting, questions, answers, seconds, refused) for setting in chosen])


def _key(setting: Setting) -> Key:
    return setting.cache, setting.acceptance, setting.salient, setting.schedule


def _answer(generator: Generator, questions: Sequence[Question], setting: Setting,
            advance: Callable[[str], None]) -> tuple[list[Generation], float]:
    start, results = time.perf_counter(), []
    for question in questions:
        results += generator.generate([question.prompt], **{"temperature": 0.0} | setting.options)  # not the bundle's
        advance(" ".join(_key(setting)))
    return results, time.perf_counter() - start


def _result(setting: Setting, questions: Sequence[Question], answers: dict[Key, list[Generation]],
            seconds: dict[Key, list[float]], refused: dict[Key, str]) -> SettingResult:
    key = _key(setting)
    names = {"cache": setting.cache, "acceptance": setting.acceptance, "salient": setting.salient,
             "schedule": setting.schedule}
    if key in refused:
        return SettingResult(**names, refused=refused[key])
    mine, times, count = answers[key], seconds[key], len(questions)
    middle, tokens = median(times), sum(generation.stats.new_tokens for generation in mine)
    # Without a cache all schedules are one.
    base = next((k for k in seconds if k[:3] == ("none", setting.acceptance, "off")), ("",) * 4)
    own = (*key[:3], "reference")
    compared = own in seconds and own != key
    known = [(q.answer, g.text) for q, g in zip(questions, mine, strict=True) if q.answer is not None]
    rows = [value for g in mine if (value := g.stats.as_dict().get("salient_rows")) is not None]
    return SettingResult(
        **names, tokens=tokens, seconds=middle, spread=(max(times) - min(times)) / middle,
        tokens_per_second=tokens / middle, speedup=median(seconds[base]) / middle if base in seconds else None,
        over_reference=Spread.of([b / a for a, b in zip(times, seconds[own], strict=True)]) if compared else None,
        as_reference=(sum(a.token_ids == b.token_ids for a, b in zip(mine, answers[own], strict=True)) / count
                      if compared else None),
        forwards=sum(g.stats.forwards for g in mine) / count,
        executed_forwards=sum(g.stats.executed_forwards for g in mine) / count,
        tokens_per_forward=tokens / max(1, sum(g.stats.forwards for g in mine)),
        unique_experts=sum(g.stats.unique_experts for g in mine) / count,
        salient_rows=sum(rows) / len(rows) if rows else None,
        agreement=_agreement(mine, answers[base]) if base in answers else None,
        same_answers=(sum(a.token_ids == b.token_ids for a, b in zip(mine, answers[base], strict=True)) / count
                      if base in answers else None),
        accuracy=sum(want == got for want, got in known) / len(known) if known else None)


def _agreement(mine: list[Generation], base: list[Generation]) -> float:
    """Places with the same token / the longer answer's places, over all prompts."""
    same = sum(a == b for x, y in zip(mine, base, strict=True) for a, b in zip(x.token_ids, y.token_ids, strict=False))
    longest = sum(max(len(x.token_ids), len(y.token_ids)) for x, y in zip(mine, base, strict=True))
    return same / longest if longest else 1.0
