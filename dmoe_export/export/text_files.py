"""The text side of a bundle: the checkpoint's tokenizer and chat template, as the runtime reads them."""

from __future__ import annotations

import shutil

from ..bundle.manifest import TokenizerEntry
from ..bundle.writer import BundleWriter
from ..checkpoint.family import Checkpoint
from ..checkpoint.text import chat_template, tokenizer_json

TOKENIZER_FILE, TEMPLATE_FILE = "tokenizer.json", "chat_template.jinja"


def copy_text(source: Checkpoint, writer: BundleWriter) -> tuple[TokenizerEntry | None, list[str]]:
    """Put tokenizer and template into the bundle; None without a tokenizer. And sentences to warn with."""
    tokenizer = tokenizer_json(source.folder)
    if tokenizer is None:
        return None, []
    shutil.copyfile(tokenizer, writer.folder / TOKENIZER_FILE)
    writer.add_file(TOKENIZER_FILE)
    template = chat_template(source.folder)
    if template is not None:
        writer.add_file(TEMPLATE_FILE, template.encode())
    return TokenizerEntry(file=TOKENIZER_FILE, chat_template=TEMPLATE_FILE if template is not None else None), []
