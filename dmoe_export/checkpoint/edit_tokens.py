"""Control tokens of a model that inserts and deletes: from its config.json, or given where that has none.

Fields as SGLang reads them (`srt/dllm/config.py`); the published ids of LLaDA2.2 are 156930 and 156931.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..description import EditTokens, ModelDescription
from ..errors import CheckpointError, InputError
from .config_fields import Fields

if TYPE_CHECKING:
    from .family import Checkpoint

FIELDS = "delete_token_id", "split_token_id"


def read_edit_tokens(f: Fields) -> EditTokens | None:
    """`delete_token_id` and `split_token_id`, or None where neither is there; raises CheckpointError for one alone."""
    there = [name for name in FIELDS if f.has(name)]
    if not there:
        return None
    if len(there) == 1:
        other = next(name for name in FIELDS if name not in there)
        raise f.refuse(f"{there[0]} is {f.get(there[0], int)} and {other} is missing; a model that inserts and deletes "
                       "has both")
    delete, split = (f.get(name, int) for name in FIELDS)
    for name, value in zip(FIELDS, (delete, split), strict=True):
        if value < 0:
            raise f.refuse(f"{name} is {value}, it must be a token id")
    return EditTokens(delete=delete, split=split)


def check_edit_tokens(description: ModelDescription, source: Path) -> None:
    """Raise CheckpointError for ids of a config.json that the model cannot have."""
    if wrong := description.wrong_edit_tokens:
        raise CheckpointError(f"{source}: {wrong}.")


def give_edit_tokens(source: Checkpoint, given: Sequence[int]) -> None:
    """Tell a checkpoint its DELETE and SPLIT, which its config.json does not say.

    Raises InputError for what are no two tokens of the model, and where config.json says others.
    """
    said, own = ",".join(map(str, given)), source.description.edit_tokens
    if len(given) != 2 or not all(isinstance(one, int) and one >= 0 for one in given):
        raise InputError(f"Edit tokens {said!r} are not two token ids; give DELETE and SPLIT, such as 156930,156931.")
    tokens = EditTokens(delete=given[0], split=given[1])
    if own not in (None, tokens):
        assert own
        raise InputError(f"Edit tokens {said} contradict {source.folder / 'config.json'}, which says {own.delete} and "
                         f"{own.split}; leave them out.")
    described = source.description.model_copy(update={"edit_tokens": tokens})
    if source.description.mask_id is None:
        raise InputError(f"{source.folder} has no mask ({described.architecture}), so it cannot insert and delete; "
                         "leave the edit tokens out.")
    if wrong := described.wrong_edit_tokens:
        raise InputError(f"Edit tokens {said} cannot be those of {source.folder}: {wrong}.")
    source.description = described
    source.full_description = source.full_description.model_copy(update={"edit_tokens": tokens})
