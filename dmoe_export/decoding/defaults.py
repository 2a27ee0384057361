"""What a bundle's requests are where they do not say: its decode defaults, and its presets over them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..bundle.reader import Bundle
from ..description import ModelDescription, RoutingMode
from ..errors import BundleError, RequestError
from .canvas_options import check_canvas_options
from .routing import routing_inputs
from .settings import OPTIONS, DecodeSettings

Values = Mapping[str, Any]  # settings of a request by their names


class Defaults:
    """The settings that a bundle gives to requests which do not say them."""

    def __init__(self, bundle: Bundle, preset: str | None = None) -> None:
        """`preset`: of requests that name none; None: as the bundle's decode defaults say.

        Raises BundleError for what no request could ask for, RequestError for a preset that the bundle does not have.
        """
        manifest = bundle.manifest
        self._folder, self._values, self._presets = bundle.folder, manifest.decode_defaults, manifest.presets
        where, wrong = first_wrong(self._values, self._presets, fits(manifest.routing.mode, manifest.model))
        if wrong:
            what = f"Preset {where}" if where else "The decode_defaults"
            raise BundleError(f"{what} of {bundle.folder} cannot be used; export again: {wrong}")
        self._own: Any = self._values.get("preset") if preset is None else preset
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
        if name is None:
            return dict(self._values)
        OPTIONS["preset"].check(name)
        if not self._presets:
            raise RequestError(f"preset is {name!r}, but {self._folder} has no presets; leave it out.")
        if name not in self._presets:
            raise RequestError(f"preset is {name!r}, but the presets of {self._folder} are "
                               f"{', '.join(self._presets)}.")
        return {**self._values, **self._presets[name], "preset": name}

    def settings(self, said: Values) -> DecodeSettings:
        """The settings of a request; what it says wins. Raises RequestError."""
        return DecodeSettings(**self.values(said.get("preset")) | dict(said))


def fits(mode: RoutingMode, model: ModelDescription) -> Callable[[DecodeSettings], object]:
    """Raises RequestError for settings that mean nothing with a bundle's model or routing; for `first_wrong`."""
    def check(settings: DecodeSettings) -> None:
        check_canvas_options(settings, model)
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
        try:
            check(DecodeSettings(**{**defaults, **values}))
        except RequestError as error:
            return name, str(error)
    return None, ""
