"""What a tokenizer.json may ask for: tokenizers come with checkpoints, and their library trusts them with all memory.

Limits are far above what published tokenizers have. They bound what one prompt can become; how long that takes is
bounded by `guards/tokenizer.py`.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

MOST_ID = 2**24  # the library lists all ids up to the highest
MOST_PIECE = 1000  # characters of one token
MOST_PARTS = 64  # normalizers, splitters, processors and decoders, whole lists counted
MOST_GROWTH = 10_000  # times that a text may grow
MOST_STEPS = 1000  # of a post-processor, ids it adds

_SECTIONS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")


def check_tokenizer(content: Any) -> int:
    """How many times as long a text may become while it is encoded, at most; raises ValueError with words."""
    if not isinstance(content, dict):
        raise ValueError("it is no JSON object")
    _check_vocabulary(content)
    model = content.get("model")
    if isinstance(model, dict) and model.get("dropout"):
        raise ValueError(f"its model drops pieces at random (dropout {str(model['dropout'])[:20]}), which is for "
                         "training; set dropout to null")
    sections = [list(_parts(content.get(name))) for name in _SECTIONS]
    count = sum(map(len, sections))
    if count > MOST_PARTS:
        raise ValueError(f"it has {count} normalizers, splitters, processors and decoders, more than {MOST_PARTS}")
    growths = [_growth(parts) for parts in sections]
    encoding = growths[0] * growths[1] * growths[2]
    for growth in (encoding, growths[3]):
        if growth > MOST_GROWTH:
            raise ValueError(f"it may make a text {growth} times as long, more than {MOST_GROWTH}")
    return encoding


def has_pattern(section: Any) -> bool:
    """Whether a section searches by regular expressions."""
    return any(isinstance(part.get("pattern"), dict) and "Regex" in part["pattern"] for part in _parts(section))


def _check_vocabulary(content: dict[str, Any]) -> None:
    model, added = content.get("model"), content.get("added_tokens") or []
    vocab = model.get("vocab") if isinstance(model, dict) else None
    pieces: dict[Any, Any] = vocab if isinstance(vocab, dict) else {
        entry[0]: 0 for entry in vocab or () if isinstance(entry, list) and entry}
    tokens = [token for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    ids = [i for i in (*pieces.values(), *(token.get("id") for token in tokens)) if isinstance(i, int)]
    if ids and not 0 <= min(ids) <= max(ids) < MOST_ID:
        wrong = next(i for i in ids if not 0 <= i < MOST_ID)
        raise ValueError(f"a token has the id {wrong if abs(wrong) < 2**64 else '2^64 or more'}, which is outside "
                         f"0 … {MOST_ID - 1}")
    longest = max((len(text) for text in (*pieces, *(token.get("content") for token in tokens))
                   if isinstance(text, str)), default=0)
    if longest > MOST_PIECE:
        raise ValueError(f"a token has {longest} characters, more than {MOST_PIECE}")


def _parts(section: Any) -> Iterator[dict[str, Any]]:
    """The parts of a section, lists of parts in order and each other; lists count, too."""
    waiting = [section]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            yield part
            for name in ("normalizers", "pretokenizers", "processors", "decoders"):
                inner = part.get(name)
                waiting += reversed(inner) if isinstance(inner, list) else ()


def _growth(parts: list[dict[str, Any]]) -> int:
    """At most how many characters or tokens become of one."""
    growth = 1
    for part in parts:
        growth *= max(1, _of_part(part))
        if growth > MOST_GROWTH**2:  # no need for the digits of a bomb
            break
    return growth


def _of_part(part: dict[str, Any]) -> int:
    kind = part.get("type")
    if kind == "Prepend":
        return 1 + _length(part.get("prepend"))
    if kind == "Replace":
        pattern = part.get("pattern")
        found = pattern.get("String") if isinstance(pattern, dict) else None
        if isinstance(found, str) and found:
            return -(-_length(part.get("content")) // len(found))
        return 1 + _length(part.get("content"))  # a pattern may match between any two characters
    if kind == "Precompiled":
        return _of_characters(part.get("precompiled_charsmap"))
    if kind == "TemplateProcessing":
        return _of_template(part)
    return {"ByteLevel": 2, "Metaspace": 2, "BertNormalizer": 3}.get(str(kind), 1)


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str) else 0


def _of_characters(text: Any) -> int:
    """Of SentencePiece's table of characters: a trie, its size before it, and what texts become, NULs between them."""
    try:
        table = base64.b64decode(text or "", validate=True)
    except (TypeError, ValueError):
        raise ValueError("its precompiled_charsmap is no base64") from None
    size = int.from_bytes(table[:4], "little")
    if len(table) < 4 or size % 4 or size > len(table) - 4:
        raise ValueError("its precompiled_charsmap is damaged")
    return max(map(len, table[4 + size:].split(b"\0")))


def _of_template(part: dict[str, Any]) -> int:
    """How often the text itself stands in what is made of it."""
    steps, special = part.get("single"), part.get("special_tokens")
    names = [next(iter(step.items())) for step in steps or () if isinstance(step, dict) and step] if isinstance(
        steps, list) else []
    ids = sum(len(one["ids"]) for one in special.values() if isinstance(one, dict) and isinstance(one.get("ids"), list)
              ) if isinstance(special, dict) else 0
    if len(names) * max(1, ids) > MOST_STEPS:
        raise ValueError(f"its post_processor adds up to {len(names) * ids} tokens, more than {MOST_STEPS}")
    return sum(kind == "Sequence" for kind, _ in names)
