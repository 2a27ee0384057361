"""The options of editing that a bundle must have been exported for."""

from __future__ import annotations

from ..description import ModelDescription
from ..errors import RequestError
from .settings import DecodeSettings
from .template import Template


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


def check_ranges(template: Template, settings: DecodeSettings) -> None:
    """Raise RequestError for gaps whose length is a range, where no place can be taken out or no end is known."""
    if template.ranges and not settings.insert_delete:
        raise RequestError("A gap of between so many and so many tokens, such as Gap(2, 8), needs a model that inserts "
                           "and deletes, and insert_delete (LLaDA2.2); give the gap one length, such as Gap(8).")
    for gap in template.gaps:
        most = gap.stop - gap.start
        if gap.stop > template.closed and most > gap.fewest:
            raise RequestError(f"The template ends with a gap of {gap.fewest} to {most} tokens, but behind the last "
                               f"given token the answer may end anywhere; give it one length, such as Gap({most}).")
