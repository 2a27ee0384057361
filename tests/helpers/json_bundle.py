"""The sample with another tokenizer: the same ids, which spell JSON; its model knows nothing of that."""

from __future__ import annotations

import shutil
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from dmoe_export.bundle.reader import Bundle
from dmoe_export.bundle.writer import BundleWriter

WORDS = [b'": ', b'{"', b'"}', b'", "', b'":"', b"true", b"false", b"null", b"[]", b"{}", b"[{", b"}]", b"00", b"name",
         b"kind", b'"a"', b"cat", b"\\n", b'\\"', b", "]
LETTERS = [bytes([code]) for code in range(0x20, 0x7F)] + [bytes([code]) for code in sorted(set("größe日本😀".encode()))
                                                           if code > 0x7F]


def write_json_bundle(sample: Bundle, target: Path) -> None:
    """Ids that are special in the sample stay so."""
    entry = sample.manifest.tokenizer
    assert entry
    old = Tokenizer.from_file(str(sample.folder / entry.file))
    special = {i: token.content for i, token in old.get_added_tokens_decoder().items() if token.special}
    pieces, vocab, filled = iter([*WORDS, *LETTERS]), {}, 0
    for id_ in range(sample.manifest.model.vocab_size):
        piece = b"" if id_ in special else next(pieces, b"")
        vocab[special.get(id_) or _spelled(piece) or f"<unused {id_}>"] = id_
        filled += bool(piece)
    assert filled >= len(WORDS) + len(LETTERS) - 1
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=next(iter(special.values()))))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(False, use_regex=False), decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in special.values()])
    tokenizer.add_special_tokens([name for name in vocab if name.startswith("<unused")])
    with BundleWriter(target) as writer:
        for file in sample.manifest.files:
            if file.path == entry.file:
                tokenizer.save(str(writer.folder / file.path))
            else:
                shutil.copyfile(sample.folder / file.path, writer.folder / file.path)
            writer.add_file(file.path)
        writer.seal(sample.manifest.model_copy(update={"files": writer.entries}))


def _spelled(piece: bytes) -> str:
    """A token's name: bytes as byte-level tokenizers write them."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [code for code in range(256) if code not in shown]
    return "".join(chr(code) if code in shown else chr(256 + hidden.index(code)) for code in piece)
