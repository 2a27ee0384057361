"""Which sizes an engine takes, by its profiles."""

from __future__ import annotations

from ...bundle.engine_entries import EngineEntry, ProfileEntry
from ...errors import RequestError
from ..backend import Limits
from .call import Sizes, round_up

_FLAGS = {"batch": ("rows", "--max-batch"), "tokens": ("tokens in one forward", "--max-prefill"),
          "past": ("cached tokens", "--max-context"), "rows": ("vocabulary rows in one forward", "--max-prefill")}


def fitted(entry: EngineEntry, least: Sizes, rows_step: int) -> Sizes:
    """The sizes to run `least` as, under the profile with the fewest tokens that takes them (`Executor.fit`).

    Raises RequestError where none does.
    """
    fits = [p for p in entry.profiles if all(_within(p, least)[name] for name in Sizes._fields)]
    if not fits:
        raise _too_large(entry, least)
    profile = min(fits, key=lambda p: p.tokens[2])
    rows = max(profile.rows[0], min(round_up(least.rows, rows_step), profile.rows[2]))
    return least._replace(tokens=max(least.tokens, profile.tokens[0]), rows=rows)


def profile_of(entry: EngineEntry, sizes: Sizes) -> int:
    """Index of the profile that such a call runs under."""
    fits = [i for i, p in enumerate(entry.profiles) if all(_within(p, sizes).values())]
    return min(fits, key=lambda i: entry.profiles[i].tokens[2])


def limits_of(entry: EngineEntry) -> Limits:
    """The most that an engine takes."""
    steps = min(entry.profiles, key=lambda p: p.tokens[2])  # the profile of denoise steps
    return Limits(max_batch=min(p.batch[2] for p in entry.profiles),
                  max_tokens=max(p.tokens[2] for p in entry.profiles), step_tokens=steps.tokens[2],
                  max_context=steps.past[2])


def _within(profile: ProfileEntry, sizes: Sizes) -> dict[str, bool]:
    """Which sizes a profile takes; too few tokens or vocabulary rows can be padded."""
    return {name: getattr(sizes, name) <= getattr(profile, name)[2] and (
        name in ("tokens", "rows") or getattr(sizes, name) >= getattr(profile, name)[0]) for name in Sizes._fields}


def _too_large(entry: EngineEntry, least: Sizes) -> RequestError:
    for name, (what, flag) in _FLAGS.items():
        most, value = max(getattr(p, name)[2] for p in entry.profiles), getattr(least, name)
        if value > most:
            return RequestError(f"{value} {what} are more than engine {entry.file} was built for ({most}); "
                                f"build one with: dmoe-export build BUNDLE {flag} {value}.")
    return RequestError(f"No profile of engine {entry.file} takes {least.batch} rows of {least.tokens} "
                        f"tokens with {least.past} cached and {least.rows} vocabulary rows at once; build one "
                        "with larger limits: dmoe-export build BUNDLE --max-prefill, --max-context, --max-batch.")
