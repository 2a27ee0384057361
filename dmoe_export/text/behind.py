"""The text of tokens that follow others: what they add to it."""

from __future__ import annotations

from .stream import Decoder


class Behind:
    """A `Decoder` of what follows some tokens. A token's text can depend on the one before it, such as a blank."""

    def __init__(self, codec: Decoder, before: list[int]) -> None:
        self._codec, self._before, self.tail = codec, before, codec.tail
        self._text = codec.decode(before)

    def decode(self, ids: list[int]) -> str:
        """What `ids` add to the text; their own where the text before them changes with them."""
        both = self._codec.decode([*self._before, *ids])
        return both[len(self._text):] if both.startswith(self._text) else self._codec.decode(ids)

    def token(self, id_: int) -> str | None:
        """As `Decoder.token`."""
        return self._codec.token(id_)
