"""Small exact tasks for the sample model: word problems, a closed set of facts, list operations.

Every generator is a pure function of a `random.Random`. Text is lower case, one space between words, punctuation glued
to the word before it; that is also what the sample's tokenizer decodes to.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

NAMES = ("tom", "anna", "sam", "lily", "max", "emma")
THINGS = ("apples", "books", "coins", "cards", "pens", "eggs")
GAINS = ("buys", "finds", "gets")
LOSSES = ("sells", "loses", "eats")

ADD = (
    "{name} has {a} {things} and {gains} {b} more. how many {things} does {name} have?",
    "{name} has {a} {things}. {name} {gains} {b} more. how many {things} does {name} have now?",
    "there are {a} {things} in a box and {b} {things} in a bag. how many {things} are there in all?",
)
SUBTRACT = (
    "{name} has {a} {things} and {loses} {b}. how many {things} are left?",
    "{name} has {a} {things}. {name} {loses} {b}. how many {things} does {name} have now?",
    "there are {a} {things} in a box. {name} {loses} {b} of the {things}. how many are left in the box?",
)
MULTIPLY = (
    "{name} has {a} bags with {b} {things} in each bag. how many {things} does {name} have?",
    "there are {b} {things} in each box. how many {things} are there in {a} boxes?",
)
TWO_STEPS = (
    "{name} has {a} {things}. {name} {gains} {b} more and then {loses} {c}. how many {things} does {name} have now?",
    "there are {a} {things} in a box. {name} {gains} {b} more {things} and then {name} {loses} {c} of the {things}. "
    "how many {things} are left in all?",
)
BARE = ("what is {sum}?", "tell me {sum}.")

CAPITALS = {"france": "paris", "italy": "rome", "spain": "madrid", "england": "london", "japan": "tokyo",
            "egypt": "cairo", "peru": "lima", "norway": "oslo"}
COLOURS = {"the sky": "blue", "grass": "green", "snow": "white", "coal": "black", "the sun": "yellow", "blood": "red"}
LEGS = {"a spider": 8, "a dog": 4, "a bird": 2, "a cat": 4, "an ant": 6, "a horse": 4}
OPPOSITES = {"hot": "cold", "big": "small", "up": "down", "day": "night", "old": "new", "fast": "slow"}
UNITS = {"days": ("a week", 7), "hours": ("a day", 24), "months": ("a year", 12), "minutes": ("an hour", 60)}

CAPITAL_QUESTIONS = ("what is the capital of {x}?", "which city is the capital of {x}?", "name the capital of {x}.",
                     "tell me the capital of {x}.", "{x} has which capital city?", "what is the capital city of {x}?")
COLOUR_QUESTIONS = ("what colour is {x}?", "which colour is {x}?", "name the colour of {x}.",
                    "tell me the colour of {x}.", "what is the colour of {x}?", "{x} has which colour?")
LEG_QUESTIONS = ("how many legs does {x} have?", "{x} has how many legs?", "what is the number of legs of {x}?",
                 "tell me how many legs {x} has.", "name the number of legs of {x}.", "how many legs are there on {x}?")
OPPOSITE_QUESTIONS = ("what is the opposite of {x}?", "which word is the opposite of {x}?",
                      "name the opposite of {x}.", "tell me the opposite of {x}.", "{x} is the opposite of which word?",
                      "what word is the opposite of {x}?")
UNIT_QUESTIONS = ("how many {x} are in {y}?", "{y} has how many {x}?", "what is the number of {x} in {y}?",
                  "tell me how many {x} are in {y}.", "how many {x} are there in {y}?", "how many {x} does {y} have?")

REVERSE = ("reverse the list {list}.", "write {list} in reverse order.", "write the numbers {list} from last to first.")
SORT = ("sort the list {list}.", "write {list} in order from smallest to largest.",
        "write the numbers of the list {list} in order, with the smallest number first and the largest number last.")
PICK = ("what is the {which} number in {list}?", "name the {which} number of the list {list}.",
        "which number is the {which} in {list}?")
COUNT = ("how many numbers are in the list {list}?", "count the numbers in {list}.")
SUM = ("what is the sum of {list}?", "add the numbers {list}.")
PICKS: dict[str, Callable[[list[int]], int]] = {"largest": max, "smallest": min, "first": lambda digits: digits[0],
                                                "last": lambda digits: digits[-1]}


@dataclass(frozen=True)
class Example:
    """One question with its exact answer."""

    task: str
    question: str
    answer: str


def arithmetic(rng: random.Random) -> Example:
    """A word problem or a bare sum; the answer shows its working."""
    kind = rng.choices(("add", "subtract", "multiply", "two steps"), (3, 3, 2, 3))[0]
    name, things = rng.choice(NAMES), rng.choice(THINGS)
    gains, loses = rng.choice(GAINS), rng.choice(LOSSES)
    c = 0
    templates: tuple[str, ...]
    if kind == "multiply":
        a, b = rng.randint(2, 9), rng.randint(2, 9)
        working, templates = f"{a} x {b} = {a * b}", MULTIPLY
    elif kind == "subtract":
        a, b = sorted((rng.randint(2, 20), rng.randint(2, 30)), reverse=True)
        a += a == b
        working, templates = f"{a} - {b} = {a - b}", SUBTRACT
    else:
        a, b = rng.randint(2, 30), rng.randint(2, 20)
        working, templates = f"{a} + {b} = {a + b}", ADD
        if kind == "two steps":
            c = rng.randint(2, min(20, a + b - 1))
            working, templates = f"{working}, {a + b} - {c} = {a + b - c}", TWO_STEPS
    if kind != "two steps" and rng.random() < 0.3:
        return Example("arithmetic", rng.choice(BARE).format(sum=working.split(" =")[0]), working)
    question = rng.choice(templates).format(name=name, things=things, gains=gains, loses=loses, a=a, b=b, c=c)
    return Example("arithmetic", question, f"{working} {things}")


def fact(rng: random.Random) -> Example:
    """A fact of the closed set in one of its phrasings."""
    kind = rng.choices(("capital", "colour", "legs", "opposite", "unit"), (8, 6, 6, 12, 4))[0]
    phrasing = rng.randrange(6)
    if kind == "capital":
        x, city = rng.choice(list(CAPITALS.items()))
        question, answer = CAPITAL_QUESTIONS[phrasing].format(x=x), f"the capital of {x} is {city}."
    elif kind == "colour":
        x, colour = rng.choice(list(COLOURS.items()))
        question, answer = COLOUR_QUESTIONS[phrasing].format(x=x), f"{x} is {colour}."
    elif kind == "legs":
        x, legs = rng.choice(list(LEGS.items()))
        question, answer = LEG_QUESTIONS[phrasing].format(x=x), f"{x} has {legs} legs."
    elif kind == "opposite":
        x, y = rng.sample(rng.choice(list(OPPOSITES.items())), 2)
        question, answer = OPPOSITE_QUESTIONS[phrasing].format(x=x), f"the opposite of {x} is {y}."
    else:
        x, (y, number) = rng.choice(list(UNITS.items()))
        question, answer = UNIT_QUESTIONS[phrasing].format(x=x, y=y), f"{y} has {number} {x}."
    opening = rng.choice(("", "please answer: ", "{name} asks: ")).format(name=rng.choice(NAMES))
    return Example("facts", opening + question, answer)


def list_operation(rng: random.Random) -> Example:
    """An operation on a short list of different digits."""
    kind = rng.choices(("reverse", "sort", "pick", "count", "sum"), (3, 3, 3, 1, 2))[0]
    length = rng.randint(2, 3) if kind == "sum" else rng.randint(3, 7)
    digits = rng.sample(range(10), length)
    templates: tuple[str, ...]
    if kind == "reverse":
        templates, answer = REVERSE, " ".join(map(str, reversed(digits)))
    elif kind == "sort":
        templates, answer = SORT, " ".join(map(str, sorted(digits)))
    elif kind == "pick":
        which = rng.choice(list(PICKS))
        templates = tuple(text.replace("{which}", which) for text in PICK)
        answer = f"the {which} number is {PICKS[which](digits)}."
    elif kind == "count":
        templates, answer = COUNT, f"the list has {length} numbers."
    else:
        templates, answer = SUM, f"{' + '.join(map(str, digits))} = {sum(digits)}"
    question = rng.choice(templates).format(list=" ".join(map(str, digits)))
    return Example("lists", rng.choice(("", "", "please ")) + question, answer)


TASKS: dict[str, Callable[[random.Random], Example]] = {"arithmetic": arithmetic, "facts": fact,
                                                        "lists": list_operation}


TRAINING_SHARES = (6, 1, 3)  # arithmetic takes longest to learn


def is_held_out(question: str) -> bool:
    """Whether a question belongs to the evaluation: one in ten, by a hash of its text, so training can never see it."""
    return hashlib.sha256(question.encode()).digest()[0] % 10 == 0


def training_examples(seed: int) -> Iterator[Example]:
    """An endless stream of examples that are not held out."""
    rng = random.Random(seed)
    while True:
        example = rng.choices(list(TASKS.values()), TRAINING_SHARES)[0](rng)
        if not is_held_out(example.question):
            yield example


def held_out_examples(count: int, seed: int = 0) -> list[Example]:
    """Different held-out examples: two fifths arithmetic, one fifth facts, two fifths lists."""
    rng = random.Random(seed)
    found: dict[str, Example] = {}
    for task, share in (("arithmetic", 2), ("facts", 1), ("lists", 2)):
        target = len(found) + count * share // 5
        while len(found) < target:
            example = TASKS[task](rng)
            if is_held_out(example.question):
                found[example.question] = example
    return list(found.values())
