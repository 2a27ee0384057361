"""What a bundle's requests are, where they do not say."""

from __future__ import annotations

from typing import Any

from ..bundle.reader import Bundle
from ..errors import BundleError, RequestError
from .canvas_options import check_canvas_options
from .routing import routing_inputs
from .settings import OPTIONS, DecodeSettings


def decode_defaults(bundle: Bundle) -> dict[str, Any]:
    """The bundle's decode defaults; raises BundleError for what no request could ask for."""
    manifest = bundle.manifest
    defaults: dict[str, Any] = dict(manifest.decode_defaults)
    unknown = defaults.keys() - OPTIONS.keys()
    wrong = f"{', '.join(sorted(unknown))} is no setting of a request." if unknown else ""
    try:
        if not unknown:
            settings = DecodeSettings(**defaults)
            check_canvas_options(settings, manifest.model)
            routing_inputs(settings, manifest.routing.mode, manifest.model.moe)
    except RequestError as error:
        wrong = str(error)
    if wrong:
        raise BundleError(f"The decode_defaults of {bundle.folder} cannot be used; export again: {wrong}")
    return defaults
