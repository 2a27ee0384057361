"""What a bundle's requests are where they do not say: its decode defaults, and its presets over them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..bundle.reader import Bundle
from ..description import ModelDescription, RoutingMode
from ..errors import BundleError, RequestError
from .canvas_options import check_canvas_options
from .edit_options import check_edit_options
from .option import OFF
from .routing import routing_inputs
from .settings import BELONG, OPTIONS, DecodeSettings

Values = Mapping[str, Any]  # settings of a request by their names


class Defaults:
    """The settings that a bundle gives to requests which do not say them."""

    def __init__(self, bundle: Bundle, preset: str | None = None) -> None:
        """`preset`: of requests that name none; None: as the bundle's decode defaults say, OFF: none.

        Raises BundleError for what no request could ask for, RequestError for a preset that the bundle does not have.
        """
        manifest = bundle.manifest
        self._folder, self._presets = bundle.folder, manifest.presets
        where, wrong = first_wrong(manifest.decode_defaults, self._presets,
                                   fits(manifest.routing.mode, manifest.model, manifest.denoiser.opens_blocks))
        if wrong:
            what = f"Preset {where}" if where else "The decode_defaults"
            raise BundleError(f"{what} of {bundle.folder} cannot be used; export again: {wrong}")
        self._values = over({}, manifest.decode_defaults)
        named = self._values.pop("preset", None)
        self._own: Any = named if preset is None else preset
        self.values()

    @property
    def presets(self) -> list[str]:
        """Names of those that the bundle has."""
        return list(self._presets)

    def values(self, preset: str | None = None) -> dict[str, Any]:
        """What the bundle gives a request that says nothing but this preset; the preset's name is among it.

        Raises RequestError for one that the bundle does not have.
        """
        name = self._own if preset is None else preset
        if name is None or OPTIONS["preset"].is_off(name):
            return dict(self._values)
        OPTIONS["preset"].check(name)
        if not self._presets:
            raise RequestError(f"preset is {name!r}, but {self._folder} has no presets; leave it out.")
        if name not in self._presets:
            raise RequestError(f"preset is {name!r}, but the presets of {self._folder} are "
                               f"{', '.join(self._presets)}.")
        return {**over(self._values, self._presets[name]), "preset": name}

    def settings(self, said: Values) -> DecodeSettings:
        """The settings of a request; what it says wins. Raises RequestError."""
        return DecodeSettings(**over(self.values(said.get("preset")), said))

    def given(self, said: Values) -> dict[str, Any]:
        """The settings of that request that it has from the bundle."""
        given = over(self.values(said.get("preset")), said)
        return {name: value for name, value in given.items() if name not in said}


def over(under: Values, said: Values) -> dict[str, Any]:
    """`said` where it says something, else `under`; what is said to be off is in neither, nor what belongs to it."""
    off = {name for name, value in said.items() if OPTIONS[name].is_off(value)}
    gone = off.union(*(BELONG.get(name, ()) for name in off))
    return ({name: value for name, value in under.items() if name not in gone}
            | {name: value for name, value in said.items() if name not in off})


def fits(mode: RoutingMode, model: ModelDescription, opens_blocks: bool) -> Callable[[DecodeSettings], object]:
    """Raises RequestError for settings that mean nothing with a bundle's model, routing or graph; for `first_wrong`."""
    def check(settings: DecodeSettings) -> None:
        check_canvas_options(settings, model)
        check_edit_options(settings, model, opens_blocks, "the bundle")
        routing_inputs(settings, mode, model.moe)
    return check


def first_wrong(defaults: Values, presets: Mapping[str, Values],
                check: Callable[[DecodeSettings], object] = lambda settings: None) -> tuple[str | None, str]:
    """What no request could ask for: which preset (None: the defaults), and why in one sentence; "" if nothing is."""
    chosen = defaults.get("preset")
    if chosen is not None and chosen not in presets:
        return None, f"preset is {str(chosen)[:100]!r}, but the presets are {', '.join(presets) or 'none'}."
    tables: list[tuple[str | None, Values]] = [(None, defaults), *presets.items()]
    for name, values in tables:
        unknown = sorted(values.keys() - OPTIONS.keys())
        if unknown:
            return name, f"{', '.join(unknown)} is no setting of a request."
        if name and "preset" in values:
            return name, "preset is no setting of a preset."
        if name == OFF:
            return name, f"{OFF} is no name of a preset, as requests say it for none."
        try:
            check(DecodeSettings(**over(over({}, defaults), values)))
        except RequestError as error:
            return name, str(error)
    return None, ""
