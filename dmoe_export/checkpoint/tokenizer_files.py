"""What tokenizer_config.json, special_tokens_map.json and added_tokens.json say, read as transformers 5 reads them.

Sources: transformers' tokenization_utils_base.py (`_from_pretrained`) and tokenization_utils_tokenizers.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from ..errors import CheckpointError
from ..guards.regular_file import MOST_CONFIG, MOST_TABLE, read_regular
from ..guards.tokenizer_limits import MOST_PIECE
from .config_fields import shown
from .json_file import read_json

CONFIG, SPECIAL_MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_END = "<|endoftext|>"
# What tokenizer classes name where their config says nothing.
_OF_CLASS = {
    "Qwen2Tokenizer": {"unk_token": _END, "eos_token": _END, "pad_token": _END},
    "DreamTokenizer": {"unk_token": _END, "eos_token": _END, "pad_token": _END},
    "GPT2Tokenizer": {"unk_token": _END, "bos_token": _END, "eos_token": _END},
    "LlamaTokenizer": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}}
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True)
class TokenizerFiles:
    """The words of a checkpoint about its tokenizer."""

    class_name: str | None  # without "Fast"
    config: dict[str, Any]
    special_tokens: dict[str, str]  # what a template knows by name
    added: list[tuple[int | None, AddedToken]]  # tokens to add, with the id they are said to have


def read_text(path: Path, most: int = MOST_CONFIG) -> str:
    """A text file of at most so many bytes, without its byte-order mark; raises CheckpointError."""
    try:
        return read_regular(path, most).decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as text: {error}.") from None


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object of a file, empty where there is none; raises CheckpointError."""
    return read_json(path, MOST_TABLE) if path.exists() else {}


def read_files(folder: Path) -> TokenizerFiles:
    """All of it; raises CheckpointError that names the file for what is no token."""
    path = folder / CONFIG
    config = read_object(path)
    class_name = config.get("tokenizer_class")
    if class_name is not None and not isinstance(class_name, str):
        raise CheckpointError(f"{path}: tokenizer_class is {shown(class_name)}, which is no name.")
    class_name = class_name.removesuffix("Fast") if class_name else None
    said: dict[str, tuple[Any, Path]] = {key: (value, path) for key, value in config.items()}
    listed = config.get("added_tokens_decoder")
    if listed is None:  # older checkpoints: the map goes before the config
        said |= {key: (value, folder / SPECIAL_MAP) for key, value in read_object(folder / SPECIAL_MAP).items()}
    elif not isinstance(listed, dict):
        raise CheckpointError(f"{path}: added_tokens_decoder is no object of ids and tokens.")
    names = {name: _token(value, source, name, special=True) for name, (value, source) in said.items()
             if value is not None and (name in NAMED or (name.endswith("_token") and isinstance(value, (str, dict))))}
    for name, content in _OF_CLASS.get(class_name or "", {}).items():
        if name not in said:
            names[name] = AddedToken(content, special=True, normalized=False)
    extra: list[AddedToken] = []
    for field in ("additional_special_tokens", "extra_special_tokens"):
        value, source = said.get(field, (None, path))
        if isinstance(value, dict):
            names |= {str(name): _token(one, source, field, special=True) for name, one in value.items()}
        elif isinstance(value, list):
            extra += [_token(one, source, field, special=True) for one in value]
        elif value is not None:
            raise CheckpointError(f"{source}: {field} is {shown(value)}, which is no list of tokens.")
    special = [*names.values(), *extra]
    added: list[tuple[int | None, AddedToken]] = []
    if listed is not None:
        added += [(_id(key, path), _token(value, path, "added_tokens_decoder")) for key, value in listed.items()]
    else:
        contents = {token.content for token in special}
        for content, id_ in read_object(folder / ADDED).items():
            added.append((_id(id_, folder / ADDED), AddedToken(
                content, special=content in contents, normalized=content not in contents)))
    added.sort(key=lambda pair: pair[0] or 0)
    return TokenizerFiles(class_name, config, {name: token.content for name, token in names.items()},
                          [*added, *((None, token) for token in special)])


def _token(value: Any, source: Path, field: str, special: bool = False) -> AddedToken:
    """A token given as text or as an object."""
    if isinstance(value, str) and _is_text(value):
        return AddedToken(value, special=special, normalized=not special)
    if isinstance(value, dict) and isinstance(value.get("content"), str) and _is_text(value["content"]):
        flags = {name: value[name] for name in _FLAGS if name in value}
        if all(isinstance(flag, bool) for flag in flags.values()):
            return AddedToken(value["content"], **flags | ({"special": True} if special else {}))
    raise CheckpointError(f"{source}: {field} is or holds {shown(value)}, which is no token; give its text, or an "
                          "object with its content.")


def _is_text(content: str) -> bool:
    """Whether a token can have it: some letters, none of them half a character (a surrogate)."""
    return 0 < len(content) <= MOST_PIECE and not any("\ud800" <= letter <= "\udfff" for letter in content)


def _id(value: Any, source: Path) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and re.fullmatch("[0-9]{1,10}", value):  # int() takes the digits of all scripts
        return int(value)
    raise CheckpointError(f"{source} gives a token the id {shown(value)}, which is no number.")
