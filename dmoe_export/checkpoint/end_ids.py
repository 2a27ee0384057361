"""Token ids that end an answer: given where the checkpoint's files do not say all, and a warning where they may not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import InputError

if TYPE_CHECKING:
    from .family import Checkpoint


def give_end_ids(source: Checkpoint, given: Sequence[int]) -> None:
    """Tell a checkpoint ids that end an answer besides its own; raises InputError for what are no ids of the model."""
    said, d = ",".join(map(str, given)), source.description
    if not given or not all(isinstance(one, int) and one >= 0 for one in given):
        raise InputError(f"End ids {said!r} are not token ids; give them with commas between, such as 151643,151645.")
    edit = (d.edit_tokens.delete, d.edit_tokens.split) if d.edit_tokens else ()
    wrong = next((one for one in given if one >= d.vocab_size or one in (d.mask_id, *edit)), None)
    if wrong is not None:
        raise InputError(f"End id {wrong} is outside the vocabulary of {d.vocab_size}, or a mask, delete or split "
                         f"token of {source.folder}; give others.")
    ids = {"eos_ids": tuple(dict.fromkeys((*d.eos_ids, *given)))}
    source.description, source.full_description = (
        one.model_copy(update=ids) for one in (d, source.full_description))
    source.says_ends = True


def goes_on(source: Checkpoint, turn_end: tuple[str, int] | None) -> str:
    """A sentence to warn with, where chat turns end with a token that may be an end nobody told of; else "".

    A generation_config.json with end ids has told of all: templates of models that end answers otherwise have such
    tokens, too (LLaDA2).
    """
    ids = source.description.eos_ids
    if turn_end is None or turn_end[1] in ids or source.says_ends:
        return ""
    name, token = turn_end
    return (f"The chat template of {source.folder} ends turns with {name!r} ({token}), which is not among the ids that "
            f"end an answer ({', '.join(map(str, ids))}, of config.json alone). If the model ends its answers so, "
            f"export with --end-ids {token}, else they go on behind their end.")
