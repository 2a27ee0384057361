"""A fast tokenizer out of the files of a slow one: byte-level BPE in vocab.json and merges.txt.

Splitting and normalising are those of transformers' classes (tokenization_qwen2.py, tokenization_gpt2.py) and of the
`DreamTokenizer` of Dream's repository (tokenization_dream.py), which is Qwen2's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from ..errors import CheckpointError
from ..guards.regular_file import MOST_TABLE
from ..guards.tokenizer import GuardedTokenizer, no_panics
from ..guards.tokenizer_limits import check_tokenizer
from .config_fields import shown
from .tokenizer_files import TokenizerFiles, read_object, read_text

VOCAB, MERGES = "vocab.json", "merges.txt"
CLASSES = ("Qwen2Tokenizer", "DreamTokenizer", "GPT2Tokenizer")
_QWEN2 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
          r"\s+(?!\S)|\s+")


def convert(folder: Path, files: TokenizerFiles) -> GuardedTokenizer | None:
    """The tokenizer of vocab.json and merges.txt, added tokens not added yet; None where the class is another one.

    Raises CheckpointError for files that are no byte-level BPE.
    """
    if files.class_name not in CLASSES or not all((folder / name).is_file() for name in (VOCAB, MERGES)):
        return None
    vocab, merges = _vocab(folder / VOCAB), _merges(folder / MERGES)
    with no_panics(lambda why: CheckpointError(f"{folder / VOCAB} and {MERGES} make no tokenizer: {why}.")):
        check_tokenizer({"model": {"vocab": vocab}})
        tokenizer = Tokenizer(models.BPE(vocab, merges, fuse_unk=False, byte_fallback=False))
    space = bool(files.config.get("add_prefix_space"))
    if files.class_name == "GPT2Tokenizer":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
    else:
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(_QWEN2), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=space and files.class_name == "Qwen2Tokenizer", use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    return GuardedTokenizer(json.loads(tokenizer.to_str()))


def add_ends(tokenizer: Tokenizer, files: TokenizerFiles) -> None:
    """The BOS and EOS that the config wants around plain text (add_bos_token, add_eos_token), once tokens are added."""
    names = [files.special_tokens.get(f"{end}_token") if files.config.get(f"add_{end}_token") is True else None
             for end in ("bos", "eos")]
    if not any(names):
        return
    bos, eos = names
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*([bos] if bos else []), "$A", *([eos] if eos else [])],
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in dict.fromkeys(n for n in names if n)])


def _vocab(path: Path) -> dict[str, int]:
    vocab: dict[str, Any] = read_object(path)
    if not all(isinstance(id_, int) and not isinstance(id_, bool) and id_ >= 0 for id_ in vocab.values()):
        raise CheckpointError(f"{path} is no vocabulary; it holds ids that are no numbers.")
    missing = [letter for letter in pre_tokenizers.ByteLevel.alphabet() if letter not in vocab]
    if missing:
        raise CheckpointError(f"{path} is no vocabulary of byte-level BPE: {len(missing)} of 256 bytes have no token, "
                              "so text would lose letters.")
    return vocab


def _merges(path: Path) -> list[tuple[str, str]]:
    merges = []
    for number, line in enumerate(read_text(path, MOST_TABLE).split("\n")):
        if not line.strip() or (number == 0 and line.startswith("#version")):
            continue
        parts = line.split()
        if len(parts) != 2:
            raise CheckpointError(f"{path}: line {number + 1} is {shown(line)}, which is no pair of pieces.")
        merges.append((parts[0], parts[1]))
    return merges
