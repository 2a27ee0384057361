"""Tokenizers of the kinds that checkpoints bring, each with control tokens of every flag; for the tests of text."""

from __future__ import annotations

import json
import string
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from dmoe_export.text.codec import TextCodec

CONTROL = ["<role>", "</role>", "<|role_end|>", "<|mask|>", "<s>"]
WORDS = ["what", "is", "two", "hello", "be", "user", "assistant", "system", "role", "end", "mask"]
PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
           r"\s+(?!\S)|\s+")
SIGNS = "<>|/_?!.,:;-'\""
TEMPLATE = ("{% for m in messages %}<role>{{ m['role'] }}</role>{{ m['content'] }}<|role_end|>{% endfor %}"
            "{% if add_generation_prompt %}<role>assistant</role>{% endif %}")


def _add(tokenizer: Tokenizer, **flags: bool) -> Tokenizer:
    """Every second control token is not marked special."""
    for i, name in enumerate(CONTROL):
        tokenizer.add_tokens([AddedToken(name, special=i % 2 == 0, normalized=False, **flags)])
    return tokenizer


def word_level() -> Tokenizer:
    """Words and signs behind a lower-casing normalizer, control tokens in the vocabulary."""
    pieces = ["<unk>", *CONTROL, *WORDS, *SIGNS, *string.ascii_lowercase, *string.digits]
    tokenizer = Tokenizer(models.WordLevel({p: i for i, p in enumerate(dict.fromkeys(pieces))}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[a-z]+|[0-9]|[^a-z0-9 ]"), "removed", invert=True)
    tokenizer.decoder = decoders.Fuse()
    return _add(tokenizer)


def whole_words() -> Tokenizer:
    """Split at spaces alone: the model itself has control tokens as words."""
    tokenizer = word_level()
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def byte_level(**flags: bool) -> Tokenizer:
    """Byte-level BPE as Qwen2's, with merges over borders of messages; control tokens behind the vocabulary."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("r", "o"), ("ro", "l"), ("rol", "e"), ("<", "|"), ("|", ">"), ("<", "role"), ("h", "e"), ("Ġ", "t"),
              (">", "<")]
    vocab = {piece: i for i, piece in enumerate([*letters, *("".join(m) for m in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PATTERN), "isolated"),
                                                       pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    return _add(tokenizer, **flags)


def metaspace(scheme: str = "first") -> Tokenizer:
    """Unigram behind "▁", with control tokens and bytes among its pieces."""
    pieces = [("<unk>", 0.0), *((c, 0.0) for c in CONTROL), *((f"<0x{i:02X}>", 0.0) for i in range(256)),
              *((f"▁{w}", -2.0) for w in WORDS), ("▁", -3.0), *((c, -4.0) for c in string.ascii_letters + SIGNS)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", CONTROL.index("<s>") + 1)])
    return _add(tokenizer)


def prepended() -> Tokenizer:
    """The older way of "▁", by normalizers, with control tokens that match what is normalized."""
    tokenizer = metaspace()
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = None
    return tokenizer


def normalized() -> Tokenizer:
    """Control tokens that match whatever is normalized to their spelling: any case, wide letters."""
    tokenizer = word_level()
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=True) for name in CONTROL])
    return tokenizer


KINDS = {
    "word-level": word_level, "whole words": whole_words, "byte-level": byte_level,
    "byte-level, spaces taken": lambda: byte_level(lstrip=True, rstrip=True),
    "byte-level, single words": lambda: byte_level(single_word=True), "metaspace first": metaspace,
    "metaspace always": lambda: metaspace("always"), "prepended": prepended, "normalized": normalized}


def codec(tokenizer: Tokenizer, folder: Path, template: str | None = TEMPLATE, **more: object) -> TextCodec:
    """A codec over a tokenizer; `more`: fields of its file to change."""
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(json.loads(tokenizer.to_str()) | more), encoding="utf-8")
    return TextCodec(file, template)
