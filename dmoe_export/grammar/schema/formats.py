"""Texts of JSON schema's `format`, as regular expressions of which every match is one; not all are matched."""

from __future__ import annotations

from typing import NamedTuple

from .pieces import Piece, piece

_DAY = "(?:0[1-9]|1[0-9]|2[0-8])"
_LEAP = ("(?:[1-9][0-9](?:0[48]|[2468][048]|[13579][26])|(?:[2468][048]|[13579][26])00)")  # from 1000 to 9999
_DATE = (f"(?:[1-9][0-9]{{3}}-(?:(?:0[1-9]|1[0-2])-{_DAY}|(?:0[13-9]|1[0-2])-(?:29|30)|(?:0[13578]|1[02])-31)"
         f"|{_LEAP}-02-29)")
_HOURS = "(?:[01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = rf"{_HOURS}:[0-5][0-9](?:\.[0-9]{{1,6}})?(?:Z|[+\-]{_HOURS})"
_BYTE = "(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_HEX = "[0-9a-fA-F]"
_HOST = r"(?:[0-9A-Za-z]{1,20}\.){1,3}[A-Za-z]{2,10}"
_PATH = r"(?:/[0-9A-Za-z._~\-]{0,30}){0,5}(?:\?[0-9A-Za-z._~=&\-]{1,60})?"


class Format(NamedTuple):
    """An expression, and the fewest and most characters of its matches."""

    piece: Piece
    fewest: int
    most: int


FORMATS: dict[str, Format] = {
    "date": Format(piece(_DATE), 10, 10),  # RFC 3339, years from 1000 on
    "time": Format(piece(_TIME, 150), 9, 21),  # RFC 3339 with its offset, without leap seconds
    "date-time": Format(piece(f"{_DATE}T{_TIME}", 400), 20, 32),
    "uuid": Format(piece(f"{_HEX}{{8}}-(?:{_HEX}{{4}}-){{3}}{_HEX}{{12}}", 450), 36, 36),
    "ipv4": Format(piece(rf"(?:{_BYTE}\.){{3}}{_BYTE}", 200), 7, 15),
    "email": Format(piece(r"[0-9A-Za-z_+\-]{1,20}(?:\.[0-9A-Za-z_+\-]{1,20}){0,2}@" + _HOST, 2000), 6, 136),
    "uri": Format(piece(f"https?://{_HOST}{_PATH}", 6000), 11, 297)}
