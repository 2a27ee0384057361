"""A checkpoint's chat template: where it lies, and which of several is the one for chat."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .tokenizer_files import CONFIG, read_object, read_text


def chat_template(folder: Path) -> tuple[str | None, list[str]]:
    """The template for chat, None without any; and sentences to warn with.

    Files of their own go before tokenizer_config.json, as in transformers; chat_template.json, which its processors
    write, comes last. Of named templates it is the one named "default"; without it, a template that says so when it is
    used. Raises CheckpointError, naming the file, for what is no template.
    """
    named = {"default": read_text(file)} if (file := folder / "chat_template.jinja").exists() else {}
    named |= {path.stem: read_text(path) for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))
              if path.stem not in named}
    for name in (CONFIG, "chat_template.json"):
        if not named:
            named = _templates(read_object(folder / name).get("chat_template"), folder / name)
    if not named:
        return None, []
    if "default" not in named:
        what = f"the checkpoint has chat templates named {', '.join(sorted(named))}, and none named default"
        return f"{{{{ raise_exception({what!r}) }}}}", [
            f"{what[0].upper()}{what[1:]}: chat is refused, plain text (--no-chat) works."]
    others = ", ".join(sorted(named.keys() - {"default"}))
    return named["default"], [f"Chat takes the template named default; left out: {others}."] if others else []


def _templates(value: Any, source: Path) -> dict[str, str]:
    """Names and sources; a lone template is the default."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list) and all(isinstance(one, dict) for one in value):
        value = {one.get("name"): one.get("template") for one in value}
    if not isinstance(value, dict) or not all(isinstance(one, str) for pair in value.items() for one in pair):
        raise CheckpointError(f"{source}: chat_template is neither a text nor texts by name.")
    return value
