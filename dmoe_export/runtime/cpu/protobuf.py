"""Messages of protobuf by hand, because `onnx` is not among the packages needed at run time."""

from __future__ import annotations


def fields(message: bytes) -> list[tuple[int, bytes, bytes]]:
    """Number, content and all bytes of each field of a message; of an integer the content is its varint.

    Raises ValueError when it is no message.
    """
    found, at = [], 0
    while at < len(message):
        begin, (tag, at) = at, varint(message, at)
        start, kind = at, tag & 7
        if kind == 0:
            at = varint(message, at)[1]
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        elif kind == 2:
            length, start = varint(message, at)
            at = start + length
        else:
            raise ValueError(f"wire type {kind} at byte {at}")
        if at > len(message):
            raise ValueError("it ends inside a field")
        found.append((tag >> 3, message[start:at], message[begin:at]))
    return found


def varint(message: bytes, at: int = 0) -> tuple[int, int]:
    """The variable-length integer at `at`, and the place behind it; raises ValueError."""
    value = shift = 0
    while True:
        if at >= len(message) or shift > 63:
            raise ValueError(f"no integer at byte {at}")
        value |= (message[at] & 0x7f) << shift
        at, shift = at + 1, shift + 7
        if message[at - 1] < 0x80:
            return value, at


def field(number: int, content: bytes | int) -> bytes:
    """A field that holds bytes (a string, a message) or an integer ≥ 0."""
    if isinstance(content, int):
        return _as_varint(number << 3) + _as_varint(content)
    return _as_varint(number << 3 | 2) + _as_varint(len(content)) + content


def _as_varint(value: int) -> bytes:
    low = []
    while value > 0x7f:
        low.append(value & 0x7f | 0x80)
        value >>= 7
    return bytes([*low, value])
