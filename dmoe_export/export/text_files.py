"""The text side of a bundle: the checkpoint's tokenizer and chat template, as the runtime reads them."""

from __future__ import annotations

import json

from ..bundle.origin import TokenizerEntry
from ..bundle.writer import BundleWriter
from ..checkpoint.end_ids import goes_on
from ..checkpoint.family import Checkpoint
from ..checkpoint.text import read_text_side
from ..text.templates import ChatTemplate
from ..text.turn_end import turn_end

TOKENIZER_FILE, TEMPLATE_FILE = "tokenizer.json", "chat_template.jinja"


def copy_text(source: Checkpoint, writer: BundleWriter) -> tuple[TokenizerEntry | None, list[str]]:
    """Put tokenizer and template into the bundle; None without a tokenizer. And sentences to warn with."""
    side = read_text_side(source.folder, source.full_description)
    if side.tokenizer is None:
        return None, side.warnings
    writer.add_file(TOKENIZER_FILE, side.tokenizer.encode())
    warnings, template = side.warnings, None
    if side.template is not None:
        template = TEMPLATE_FILE
        writer.add_file(template, side.template.encode())
        chat = ChatTemplate(side.template, side.special_tokens)
        broken = chat.broken
        if broken:
            warnings.append(f"The chat template of {source.folder} is no valid template, so chat is refused and plain "
                            f"text (--no-chat) works: {broken}.")
        control = {token["content"]: token["id"] for token in json.loads(side.tokenizer).get("added_tokens") or []}
        said = goes_on(source, turn_end(chat, control))
        warnings += [said] if said else []
    return TokenizerEntry(file=TOKENIZER_FILE, chat_template=template, special_tokens=side.special_tokens), warnings
