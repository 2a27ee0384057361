"""dmoe-export: mixture-of-experts diffusion language models, from a checkpoint to bundles that generate text.

`Generator` (run time, no torch) and `export_checkpoint` (needs the `export` extra) are the two public faces;
`Generation`, `Block` and `Statistics` are what a generator answers, a `Stream` yields blocks, `GenerateOptions` is the
type of its options, and `DmoeError` the base of all errors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Block", "BundleError", "CheckError", "CheckpointError", "DmoeError", "GenerateOptions", "Generation",
           "Generator", "InputError", "MissingRequirementError", "NotFiniteError", "OutputError", "RequestError",
           "Statistics", "Stream", "export_checkpoint"]

if TYPE_CHECKING:
    from .errors import (
        BundleError,
        CheckError,
        CheckpointError,
        DmoeError,
        InputError,
        MissingRequirementError,
        NotFiniteError,
        OutputError,
        RequestError,
    )
    from .export.exporter import export_checkpoint
    from .generator import Block, GenerateOptions, Generation, Generator, Statistics, Stream


def __getattr__(name: str) -> Any:
    """Import the public names on first use, so that the runtime never pulls in torch."""
    if name in ("Block", "GenerateOptions", "Generation", "Generator", "Statistics", "Stream"):
        from . import generator

        return getattr(generator, name)
    if name in __all__ and name.endswith("Error"):
        from . import errors

        return getattr(errors, name)
    if name == "export_checkpoint":
        try:
            from .export.exporter import export_checkpoint
        except ModuleNotFoundError as error:
            from .errors import MissingRequirementError
            from .extras import pip_install

            raise MissingRequirementError(f"Exporting needs {error.name}; run: {pip_install('export')}.") from error
        return export_checkpoint
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
