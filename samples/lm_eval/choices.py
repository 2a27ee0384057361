"""Wrong answers for the sample's held-out questions: right ones of other questions, as like the right one as can be."""

from __future__ import annotations

from typing import Any

WRONG = 3


def with_wrong_answers(dataset: Any) -> Any:
    """Rows with four `choices`, and `right`, the place of the right one; both are functions of the row's number."""
    rows = list(dataset)
    return dataset.map(lambda row, number: choices_of(rows, number), with_indices=True)


def choices_of(rows: list[dict[str, str]], number: int) -> dict[str, Any]:
    """Of the answers to the questions after this one, in a circle, the nearest in length of the same task."""
    mine = rows[number]
    others = [*rows[number + 1:], *rows[:number]]
    answers = dict.fromkeys(row["answer"] for row in others if row["task"] == mine["task"])
    answers.pop(mine["answer"], None)
    words = len(mine["answer"].split())
    wrong = sorted(answers, key=lambda answer: abs(len(answer.split()) - words))[:WRONG]  # stable: the circle's order
    right = number % (WRONG + 1)
    return {"choices": [*wrong[:right], mine["answer"], *wrong[right:]], "right": right}
