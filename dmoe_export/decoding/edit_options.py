"""The options of editing that a bundle must have been exported for."""

from __future__ import annotations

from ..description import ModelDescription
from ..errors import RequestError
from .settings import DecodeSettings


def check_edit_options(settings: DecodeSettings, d: ModelDescription, opens_blocks: bool, bundle: str) -> None:
    """Raise RequestError for a way to edit that the model, or the graph, cannot; `bundle`: its place or name.

    `opens_blocks`: the graph lets blocks see one another.
    """
    if settings.edit_blocks and not opens_blocks:
        raise RequestError(f"edit_blocks needs a graph in which blocks can see one another, and that of {bundle} is "
                           "none; export it again with --multi-block-editing, or leave edit_blocks out.")
    if settings.insert_delete and not d.edit_tokens:
        raise RequestError(f"insert_delete needs the ids of the model's control tokens, and {bundle} has none; "
                           "export it again with --edit-tokens DELETE,SPLIT, or leave insert_delete out.")
