"""What a scoring may choose: told once, as the options of a request are (settings.py)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, TypedDict, get_args

from .option import AT_LEAST_0, Rule, Told, one_of, options_of
from .settings import OPTIONS

EstimatorName = Literal["one_pass", "monte_carlo"]
ESTIMATORS: tuple[EstimatorName, ...] = get_args(EstimatorName)
ROUTING = ("coreset_top_p", "min_experts", "coreset_size")
_SAMPLES = Rule(lambda value: 1 <= value <= 2**16, f"between 1 and {2**16}")
_ROWS = Rule(lambda value: 1 <= value <= 1024, "between 1 and 1024")
_GROUP = "scoring"


@dataclass(frozen=True)
class ScoreSettings:
    """Settings of one scoring. Raises RequestError for values that mean nothing."""

    estimator: Annotated[EstimatorName, Told(
        "How a choice's log-probability is estimated: one_pass (all its places masked, in one forward pass; LLaDA2 and "
        "its like: one for each block) or monte_carlo (mean over random sets of masked places, a lower bound; LLaDA)",
        one_of(ESTIMATORS), group=_GROUP)] = "one_pass"
    samples: Annotated[int, Told(
        "Sets of masked places that are drawn for each block of a choice; where there are no more than that, all are "
        "computed and there is no chance in it (monte_carlo)", _SAMPLES, group=_GROUP)] = 128
    end: Annotated[bool, Told("The model's end token is a part of each choice: that the answer ends there counts, too",
                              group=_GROUP)] = False
    seed: Annotated[int, Told("Start of the random numbers (monte_carlo)", AT_LEAST_0, group=_GROUP)] = 0
    batch: Annotated[int, Told("Most rows of a forward pass; more takes more memory and changes no score", _ROWS,
                               group=_GROUP)] = 8
    coreset_top_p: Annotated[float | None, OPTIONS["coreset_top_p"].told] = None
    min_experts: Annotated[int | None, OPTIONS["min_experts"].told] = None
    coreset_size: Annotated[int | None, OPTIONS["coreset_size"].told] = None

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        for name, one in SCORE_OPTIONS.items():
            one.check(getattr(self, name))


SCORE_OPTIONS = options_of(ScoreSettings)


class ScoreOptions(TypedDict, total=False):
    """Keywords of `Generator.score`: the fields of `ScoreSettings`, each of which may be None: the default."""

    estimator: EstimatorName | None
    samples: int | None
    end: bool | None
    seed: int | None
    batch: int | None
    coreset_top_p: float | None
    min_experts: int | None
    coreset_size: int | None
