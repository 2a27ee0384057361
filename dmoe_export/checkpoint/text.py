"""The text side of a checkpoint: tokenizer.json and the chat template."""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import CheckpointError


def tokenizer_json(folder: Path) -> Path | None:
    """The fast tokenizer's file, or None when the checkpoint has none."""
    path = folder / "tokenizer.json"
    return path if path.is_file() else None


def chat_template(folder: Path) -> str | None:
    """The checkpoint's own chat template: chat_template.jinja, else the field of tokenizer_config.json."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{file} cannot be read as text: {error}.") from None
    config = folder / "tokenizer_config.json"
    if not config.is_file():
        return None
    try:
        template = json.loads(config.read_text(encoding="utf-8")).get("chat_template")
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{config} cannot be read as a JSON object: {error}.") from None
    if isinstance(template, list):  # named templates; "default" is the one for chat
        template = next((t.get("template") for t in template if t.get("name") == "default"), None)
    return template
