"""The text side of a checkpoint: its tokenizer as one tokenizer.json, its chat template, its special tokens by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from ..description import ModelDescription
from ..errors import CheckpointError
from ..guards.regular_file import MOST_TABLE
from ..guards.tokenizer import GuardedTokenizer, no_panics
from ..words import count
from .chat_template import chat_template
from .tokenizer_conversion import add_ends, convert
from .tokenizer_files import ADDED, CONFIG, TokenizerFiles, read_files, read_text

TOKENIZER = "tokenizer.json"
# Files of tokenizers that are not read here.
_OTHERS = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "merges.txt", "vocab.txt",
           "tekken.json", ADDED)


@dataclass(frozen=True)
class TextSide:
    """What a bundle takes over."""

    tokenizer: str | None  # the text of tokenizer.json; None: token ids alone
    template: str | None
    special_tokens: dict[str, str]
    warnings: list[str]


def read_text_side(folder: Path, description: ModelDescription) -> TextSide:
    """All of it, as transformers would use it; raises CheckpointError for files that cannot be read so."""
    files = read_files(folder)
    path = folder / TOKENIZER
    before = read_text(path, MOST_TABLE) if path.exists() else None
    guarded = _open(path, before) if before is not None else convert(folder, files)
    if guarded is None:
        return TextSide(None, None, {}, [_nothing(folder)])
    tokenizer = guarded.raw
    with no_panics(_refusal(path)):
        warnings = _add(guarded, files, folder)
        if before is None:
            add_ends(tokenizer, files)
            _check_covers(tokenizer, description, folder)
        warnings += _beyond(tokenizer, description)
    template, said = chat_template(folder)
    if files.config.get("clean_up_tokenization_spaces") is True and not _is_bpe(tokenizer):
        said.append(f"{folder / CONFIG} asks for spaces to be cleaned up in decoded text, which is not done here.")
    settings = any(guarded.content.get(name) is not None for name in ("truncation", "padding"))
    if before is None or settings or _tokens(tokenizer) != _tokens(_open(path, before).raw):
        with no_panics(_refusal(path)):
            before = tokenizer.to_str(pretty=True)
    return TextSide(before, template, files.special_tokens, warnings + said)


def _open(path: Path, text: str) -> GuardedTokenizer:
    with no_panics(_refusal(path)):
        return GuardedTokenizer(json.loads(text))


def _refusal(path: Path) -> Callable[[str], CheckpointError]:
    return lambda why: CheckpointError(f"{path} cannot be read as a tokenizer: {why}.")


def _add(guarded: GuardedTokenizer, files: TokenizerFiles, folder: Path) -> list[str]:
    """Add the tokens that stand beside tokenizer.json; sentences where one gets another id than it is said to have."""
    tokenizer = guarded.raw
    before = tokenizer.get_added_tokens_decoder()
    there = {token.content: token for token in before.values()}
    listed = files.config.get("added_tokens_decoder") is not None  # it goes before the flags in tokenizer.json
    for said, token in files.added:
        old = there.get(token.content)
        if said is None and old is not None:  # one with a name becomes special, where no list says what it is
            if listed:
                continue
            token = AddedToken(old.content, single_word=old.single_word, lstrip=old.lstrip, rstrip=old.rstrip,
                               normalized=old.normalized, special=True)
        if old is None or ((listed or said is None) and _flags(old) != _flags(token)):
            guarded.add([token])
            there[token.content] = token
    wrong = [(token.content, said, got) for said, token in files.added
             if said is not None and (got := tokenizer.token_to_id(token.content)) != said]
    if not wrong:
        return []
    content, said, got = wrong[0]
    return [f"The tokenizer gives {count(len(wrong), 'token')} another id than {folder / CONFIG} or {ADDED} say, first "
            f"{content!r} ({got}, not {said}); transformers takes the tokenizer's, and so does the bundle."]


def _flags(token: AddedToken) -> tuple[bool, ...]:
    return token.single_word, token.lstrip, token.rstrip, token.normalized, token.special


def _tokens(tokenizer: Tokenizer) -> dict[int, str]:
    return {id_: repr(token) for id_, token in tokenizer.get_added_tokens_decoder().items()}


def _check_covers(tokenizer: Tokenizer, d: ModelDescription, folder: Path) -> None:
    """A converted tokenizer must know the ids that the model cannot do without."""
    for name, id_ in (("mask", d.mask_id), *(("EOS", eos) for eos in d.eos_ids)):
        if id_ is not None and tokenizer.id_to_token(id_) is None:
            raise CheckpointError(f"The tokenizer of vocab.json and merges.txt in {folder} has no token of the {name} "
                                  f"id {id_}; added_tokens.json or added_tokens_decoder of {CONFIG} is missing or "
                                  "incomplete.")


def _beyond(tokenizer: Tokenizer, d: ModelDescription) -> list[str]:
    vocabulary = tokenizer.get_vocab()
    beyond = sorted((id_, token) for token, id_ in vocabulary.items() if id_ >= d.vocab_size)
    if not beyond:
        return []
    return [f"The tokenizer has {count(len(beyond), 'token')} outside the model's vocabulary of {d.vocab_size}, first "
            f"{beyond[0][1]!r} ({beyond[0][0]}); a prompt with one of them is refused."]


def _is_bpe(tokenizer: Tokenizer) -> bool:
    return type(tokenizer.model).__name__ == "BPE"


def _nothing(folder: Path) -> str:
    found = [name for name in _OTHERS if (folder / name).is_file()]
    found += sorted(path.name for path in folder.glob("*.tiktoken"))
    if not found:
        return (f"{folder} has no tokenizer files, so the bundle has no tokenizer and takes token ids alone "
                "(--prompt-ids).")
    return (f"The tokenizer files of {folder} ({', '.join(found)}) are of a kind that is not read, so the bundle "
            "has no tokenizer and takes token ids alone (--prompt-ids); let transformers write a tokenizer.json beside "
            "them: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER).")
