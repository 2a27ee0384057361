"""What an outcome is called: right, refused in one sentence, or a defect."""

from __future__ import annotations

import json
import re
import signal
from dataclasses import dataclass

from .child import BYTES, DESCRIBED, MUTATOR, SECONDS, TRACEBACK, Outcome

FINE = ("right", "answered", "accepted", "refused", "environment", "not finite")
DEFECTS = (
    "traceback",
    "unforeseen",
    "hang",
    "killed",
    "memory",
    "noise",
    "sentences",
    "left behind",
    "elsewhere",
    "silently wrong",
    "wrong code",
    "fuzzer",
)
MACHINE = ("command line", "Python face")  # what may ask for what this machine lacks; files must not be blamed on it
# A refusal's line, and all that a command may print on stderr: sentences, warnings, the summary of an answer.
_SAID = re.compile(r"^dmoe-export: (?!warning:|.* s so far$)")
_EXPECTED = re.compile(
    r"^(dmoe-export: |\[.*\]$|Usage: |Try 'dmoe-export |Error: |The bundle .* was exported and is complete|"
    r"block \d+, step \d+, |$)"
)
# The library `tokenizers` prints its panics itself, before our sentence (docs/threat-model.md).
_PANIC = re.compile(r"^\n?thread '[^'\n]*' (\(\d+\) )?panicked at .*\n.*\n(note: .*RUST_BACKTRACE.*\n)?", re.MULTILINE)
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@dataclass
class Verdict:
    """`name` is one of FINE or DEFECTS; `why` tells a defect."""

    name: str
    why: str = ""

    @property
    def defect(self) -> bool:
        """Whether the program is wrong."""
        return self.name in DEFECTS


def judge(outcome: Outcome) -> Verdict:
    """The verdict on one case."""
    status, said = outcome.status, _PANIC.sub("", outcome.stderr)
    lines = said.splitlines()
    last = lines[-1] if lines else ""
    if status is None:
        return Verdict("hang", f"not done after {SECONDS} s")
    if status == MUTATOR:
        return Verdict("fuzzer", last)
    if status < 0:
        return Verdict("killed", f"by {signal.Signals(-status).name}: {last[:200]}")
    if status == TRACEBACK or "Traceback (most recent call last)" in said:
        return Verdict("traceback", last[:300])
    if "unexpected" in said and "please report" in said:
        return Verdict("unforeseen", last[:300])
    if outcome.peak > BYTES:
        return Verdict("memory", f"{outcome.peak / 1e9:.1f} GB")
    if outcome.elsewhere:
        return Verdict("elsewhere", ", ".join(outcome.elsewhere)[:300])
    odd = [line for line in lines if not _EXPECTED.match(line)]
    if odd:
        return Verdict("noise", odd[0][:300])
    if outcome.commands and _CONTROL.search(said.replace("\n", "")):  # a sentence of an exception is no terminal's
        return Verdict("noise", f"control characters: {said.strip()[:300]!r}")
    return _ended(outcome, status, lines)


def _ended(outcome: Outcome, status: int, lines: list[str]) -> Verdict:
    sentences = [line for line in lines if _SAID.match(line) or line.startswith("Error: ")]
    if status == 0 or status == DESCRIBED:
        if sentences:
            return Verdict("sentences", f"exit 0 and {sentences[0][:200]}")
        if any("temporary" in name or ".partial-" in name for name in outcome.left):
            return Verdict("left behind", ", ".join(outcome.left))
        if outcome.must_refuse:
            return Verdict("silently wrong", "answered, though the manifest does not say what the files are")
        if status == DESCRIBED:
            return Verdict("accepted")
        if outcome.right is None:
            return Verdict("answered")
        got = json.loads(outcome.stdout.splitlines()[-1])["token_ids"]
        return Verdict("right") if got == outcome.right else Verdict("silently wrong", f"{got} for {outcome.right}")
    if outcome.right is not None:
        return Verdict("silently wrong", f"nothing was changed, and it is refused: {' '.join(lines)[:200]}")
    if status not in (1, 2, 3):
        return Verdict("unforeseen", f"exit {status}: {' '.join(lines)[:200]}")
    if len(sentences) != 1:
        return Verdict("sentences", f"exit {status} and {len(sentences)} sentences: {' | '.join(lines)[:300]}")
    finished = "$ generate" in outcome.stdout and any(c[0] == "export" for c in outcome.commands)
    if outcome.left and not finished:
        return Verdict("left behind", ", ".join(outcome.left)[:300])
    if status == 1 and not re.search(r"NaN|infinit|not finite|no number", sentences[0]):
        return Verdict("unforeseen", f"exit 1: {sentences[0][:250]}")
    if status == 3 and outcome.target not in MACHINE:
        return Verdict("wrong code", f"exit 3: {sentences[0][:250]}")
    return Verdict({1: "not finite", 2: "refused", 3: "environment"}[status])


def kind_of(verdict: Verdict) -> str:
    """What equal defects have in common: numbers, names and paths do not count."""
    text = re.sub(r"'[^']*'|\"[^\"]*\"|/\S+|\d+|\x1b\[[0-9;]*m", "…", verdict.why)
    return f"{verdict.name}: {text[:90]}"
