"""dmoe-export: mixture-of-experts diffusion language models, from a checkpoint to bundles that generate text.

`Generator` (run time, no torch) and `export_checkpoint` (needs the `export` extra) are the two public faces;
`Generation`, `Block` and `Statistics` are what a generator answers, a `Stream` yields blocks, `GenerateOptions` is the
type of its options, and `DmoeError` the base of all errors. `Batch` takes a `Request` at any step and gives `Event`s.
A `Score` says how probable a given answer is; `ScoreOptions` is the type of the options for that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Batch", "Block", "BundleError", "CheckError", "CheckpointError", "DmoeError", "Event", "Filled", "Gap",
           "GenerateOptions", "Generation", "Generator", "Infilling", "InputError", "LengthError",
           "MissingRequirementError", "NotFiniteError", "OutputError", "Request", "RequestError", "Score",
           "ScoreOptions", "Statistics", "Stream", "TokenProbability", "export_checkpoint"]

if TYPE_CHECKING:
    from .batch import Batch, Event, Request
    from .decoding.answer import Block, Generation, Statistics, TokenProbability
    from .decoding.score import Score
    from .decoding.score_settings import ScoreOptions
    from .decoding.settings import GenerateOptions
    from .decoding.stream import Stream
    from .decoding.template import Gap
    from .errors import (
        BundleError,
        CheckError,
        CheckpointError,
        DmoeError,
        InputError,
        LengthError,
        MissingRequirementError,
        NotFiniteError,
        OutputError,
        RequestError,
    )
    from .export.exporter import export_checkpoint
    from .filling import Filled, Infilling
    from .generator import Generator


def __getattr__(name: str) -> Any:
    """Import the public names on first use, so that the runtime never pulls in torch."""
    if name in __all__ and name.endswith("Error"):
        from . import errors

        return getattr(errors, name)
    if name == "Generator":
        from .generator import Generator

        return Generator
    if name == "GenerateOptions":
        from .decoding.settings import GenerateOptions

        return GenerateOptions
    if name == "Score":
        from .decoding.score import Score

        return Score
    if name == "ScoreOptions":
        from .decoding.score_settings import ScoreOptions

        return ScoreOptions
    if name == "Gap":
        from .decoding.template import Gap

        return Gap
    if name in ("Filled", "Infilling"):
        from . import filling

        return getattr(filling, name)
    if name in ("Batch", "Event", "Request"):
        from . import batch

        return getattr(batch, name)
    if name in ("Block", "Generation", "Statistics", "TokenProbability"):
        from .decoding import answer

        return getattr(answer, name)
    if name == "Stream":
        from .decoding.stream import Stream

        return Stream
    if name == "export_checkpoint":
        try:
            from .export.exporter import export_checkpoint
        except ModuleNotFoundError as error:
            from .errors import MissingRequirementError
            from .extras import pip_install

            raise MissingRequirementError(f"Exporting needs {error.name}; run: {pip_install('export')}.") from error
        return export_checkpoint
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
