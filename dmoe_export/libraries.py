"""Where the compiled libraries are: in the folder lib/ of this package, put there by the wheel or by `make`."""

from __future__ import annotations

from pathlib import Path

from . import __path__ as _installed


def library(name: str) -> Path:
    """The file of an installed library, such as "libdmoe_cpu.so"; where it belongs, if it is not there.

    An editable installation has two folders: the sources', which goes first, and the one pip compiled into.
    """
    places = [Path(folder) / "lib" / name for folder in (str(Path(__file__).parent), *_installed)]
    return next((place for place in places if place.is_file()), places[0])
