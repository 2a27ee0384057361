"""What a bundle says of decoding: defaults and presets, of the checkpoint and of whoever exports it."""

from __future__ import annotations

from collections.abc import Mapping

from ..bundle.manifest import DecodeValues
from ..checkpoint.family import Checkpoint
from ..decoding.defaults import first_wrong, fits
from ..description import RoutingDescription
from ..errors import InputError


def choose_decoding(source: Checkpoint, routing: RoutingDescription, asked: DecodeValues,
                    presets: Mapping[str, DecodeValues], opens_blocks: bool = False
                    ) -> tuple[DecodeValues, dict[str, DecodeValues], list[str]]:
    """Decode defaults, presets, and sentences to warn with; what the checkpoint says wins over `asked`.

    `opens_blocks`: the graph will let blocks see one another.
    Raises InputError for what no request could ask of the bundle.
    """
    own = source.decode_defaults
    name, wrong = first_wrong({**asked, **own}, presets, fits(routing.mode, source.description, opens_blocks))
    if wrong:
        raise InputError(f"{f'Preset {name}' if name else 'A decode default'} cannot be exported: {wrong}")
    said = [f"{source.folder} sets {option} {value}, so the {asked[option]} that was asked for is no decode default."
            for option, value in own.items() if asked.get(option, value) != value]
    return {**asked, **own}, {name: dict(values) for name, values in presets.items()}, said
