"""Encoding in which only given places of a text are control tokens, and every other text is text, whatever it spells.

Each added token of a tokenizer gets a second name that nobody writes, one private character; a copy of the tokenizer
knows its added tokens by these names alone. The places that shall be tokens are written with them, and the whole text
is encoded once: normalising, splitting and merging across places happen as in the tokenizer itself.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken

from ..errors import RequestError
from ..guards.tokenizer import GuardedTokenizer

FIRST, LAST = 0x100000, 0x10FFFD  # private-use plane 16
_TRIES = 16  # rounds of cuts in one text
_MOST_CORE = 16  # characters that one of a token is normalised from


@dataclass(frozen=True)
class Own:
    """A place of a text that is a token: characters [start, end)."""

    start: int
    end: int
    id: int


class LiteralEncoder:
    """A tokenizer whose added tokens cannot be spelled."""

    def __init__(self, guarded: GuardedTokenizer, model: dict[str, Any]) -> None:
        """`guarded`: as it encodes by itself, without truncation and padding; `model`: that part of its file."""
        self._guarded, self._tokenizer = guarded, guarded.raw
        added: dict[int, AddedToken] = self._tokenizer.get_added_tokens_decoder()
        # Runs of spaces or line ends are text to everybody, whatever the tokenizer keeps them as.
        self.control = {i: token for i, token in added.items() if token.content.strip() or token.special}
        self._spaces = {i: token for i, token in added.items() if i not in self.control}
        unknown = model.get("unk_token", model.get("unk_id"))
        if isinstance(unknown, str):
            unknown = self._tokenizer.token_to_id(unknown)
        # Ids that any text may have: of unknown words, and of single bytes.
        self._of_text = {unknown} | ({i for i, t in self.control.items() if _is_byte(t.content)}
                                     if model.get("byte_fallback") else set())
        self._copies: dict[int, _Copy] = {}

    def own_tokens(self, text: str) -> list[Own]:
        """Where a tokenizer takes parts of a text as control tokens."""
        encoding = self._guarded.encode(text)
        return [found for id_, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)
                if (token := self.control.get(id_)) is not None
                and (found := self._place(text, start, end, id_, token)) is not None]

    def control_ids(self, ids: list[int]) -> list[int]:
        """Those of ids that are control tokens and nothing an ordinary text may give."""
        return [i for i in ids if i in self.control and i not in self._of_text]

    def normal(self, text: str) -> str:
        """A text as matches of tokens may see it: lower case, and in compatible letters."""
        return unicodedata.normalize("NFKC", text).casefold()

    def encode(self, text: str, own: list[Own] | None = None, add_special_tokens: bool = False) -> list[int]:
        """Ids of a text in which `own` are tokens and nothing else is; `own` in order, apart from each other.

        `add_special_tokens`: what the tokenizer's post-processor adds, such as a BOS. Raises RequestError where the
        tokenizer makes a control token of plain characters, however they are cut.
        """
        copy = self._copy_for(text)
        at, parts = 0, []
        for place in own or ():
            parts += [text[at:place.start], copy.name_of[place.id]]
            at = place.end
        written = "".join([*parts, text[at:]])
        for _ in range(_TRIES):
            encoding = copy.guarded.encode(written, add_special_tokens=add_special_tokens)
            # Ids of the copy's names may be those of tokens here; what the post-processor added is of here.
            made = list(zip(encoding.ids, encoding.offsets, encoding.special_tokens_mask, strict=True))
            wrong = [span for id_, span, added in made if not added and id_ not in copy.id_of
                     and id_ != copy.cut_id and self.control_ids([id_])]
            if not wrong:
                return [id_ if added else copy.id_of.get(id_, id_) for id_, _, added in made
                        if added or id_ != copy.cut_id]
            # The model itself has a piece of that spelling: cut it behind its first letter.
            for start, end in reversed(wrong):
                start += len(written[start:end]) - len(written[start:end].lstrip())
                if start + 1 >= end:
                    raise RequestError("The tokenizer makes a control token of the plain characters "
                                       f"{written[start:end]!r}, however they are cut; leave them out.")
                written = written[:start + 1] + copy.cut + written[start + 1:]
        raise RequestError("The tokenizer makes control tokens of plain characters of the text, however they are cut; "
                           "leave out what spells them.")

    def _place(self, text: str, start: int, end: int, id_: int, token: AddedToken) -> Own | None:
        """The token's characters within its offsets, which may hold spaces around it; None for e.g. unknown words."""
        found = text.find(token.content, start, end)
        if found >= 0:
            return Own(found, found + len(token.content), id_)
        core = text[start:end].strip()
        if len(core) > _MOST_CORE * len(token.content):  # normalising holds up all threads
            return None
        normalizer = self._tokenizer.normalizer
        if not token.normalized or normalizer is None or (
                normalizer.normalize_str(core) != normalizer.normalize_str(token.content)):
            return None
        start += len(text[start:end]) - len(text[start:end].lstrip())
        return Own(start, start + len(core), id_)

    def _copy_for(self, text: str) -> _Copy:
        """A copy whose names do not occur in the text."""
        needed, first = len(self.control) + 1, FIRST
        while any(first <= ord(c) < first + needed for c in text if ord(c) >= FIRST):
            first += needed
            if first + needed > LAST:
                raise RequestError("The text holds private characters of all kinds (U+100000 and up); leave them out.")
        if first not in self._copies:
            self._copies[first] = _Copy(self._guarded, self.control, self._spaces, first)
        return self._copies[first]


class _Copy:
    """A tokenizer that knows its control tokens by private characters from `first` on."""

    def __init__(self, guarded: GuardedTokenizer, control: dict[int, AddedToken], spaces: dict[int, AddedToken],
                 first: int) -> None:
        self.guarded = GuardedTokenizer(guarded.content | {"added_tokens": []})
        self.tokenizer = self.guarded.raw
        self.name_of = {id_: chr(first + n) for n, id_ in enumerate(control)}
        self.cut = chr(first + len(control))
        self.tokenizer.add_tokens(
            [_flags(token, self.name_of[id_]) for id_, token in control.items()]
            + list(spaces.values())
            + [AddedToken(self.cut, normalized=False)])
        names = self.name_of | {id_: token.content for id_, token in spaces.items()}
        # id in the copy → id in the tokenizer; a name that its normalizer leaves nothing of has none
        here = {id_: self.tokenizer.token_to_id(name) for id_, name in names.items()}
        self.id_of = {mine: id_ for id_, mine in here.items() if mine is not None}
        self.cut_id = self.tokenizer.token_to_id(self.cut)


def _flags(token: AddedToken, content: str) -> AddedToken:
    return AddedToken(content, single_word=False, lstrip=token.lstrip, rstrip=token.rstrip, normalized=token.normalized,
                      special=False)


def _is_byte(content: str) -> bool:
    return len(content) == 6 and content.startswith("<0x") and content.endswith(">")
