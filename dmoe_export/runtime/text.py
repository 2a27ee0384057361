"""Text in and out: chat template, tokenizer, and escaping so that a user's text never acts as a special token."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from ..bundle.reader import Bundle
from ..errors import BundleError, RequestError

Message = dict[str, str]

# LLaDA2's own chat text, for checkpoints that carry its special tokens but no template.
_LLADA2_TEMPLATE = (
    "{% for m in messages %}<role>{{ {'system': 'SYSTEM', 'user': 'HUMAN', 'assistant': 'ASSISTANT'}[m['role']] }}"
    "</role>{{ m['content'] }}<|role_end|>{% endfor %}{% if add_generation_prompt %}<role>ASSISTANT</role>{% endif %}")


def _raise(message: str) -> None:
    raise TemplateError(message)


class TextCodec:
    """Tokenizer and chat template of a bundle."""

    def __init__(self, tokenizer_file: Path, template: str | None, eos_id: int | None = None) -> None:
        """`template`: chat template source; None picks LLaDA2's when its tokens are known, else plain prompts.

        `eos_id` names the token a template knows as `eos_token`; `bos_token` is empty, as LLaDA2 prompts have none.
        """
        try:
            text = tokenizer_file.read_text(encoding="utf-8")
            self._tokenizer, self._literal = Tokenizer.from_str(text), Tokenizer.from_str(text)
        except Exception as error:  # tokenizers raises bare Exception
            raise BundleError(f"{tokenizer_file} cannot be read as a tokenizer: {error}.") from None
        self._literal.encode_special_tokens = True
        self._special = [t.content for t in self._tokenizer.get_added_tokens_decoder().values() if t.special]
        if template is None and "<role>" in self._special:
            template = _LLADA2_TEMPLATE
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                    extensions=["jinja2.ext.loopcontrols"])
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.now(timezone.utc).strftime(form)
        self._eos_token = "" if eos_id is None else self._tokenizer.id_to_token(eos_id) or ""
        try:
            self._template = environment.from_string(template) if template else None
        except TemplateError as error:
            raise BundleError(f"The chat template beside {tokenizer_file} is no valid template: {error}.") from None

    @classmethod
    def of(cls, bundle: Bundle) -> TextCodec | None:
        """The codec of a bundle, or None when it has no tokenizer."""
        entry = bundle.manifest.tokenizer
        if entry is None:
            return None
        template = (bundle.folder / entry.chat_template).read_text(encoding="utf-8") if entry.chat_template else None
        return cls(bundle.folder / entry.file, template, bundle.manifest.model.eos_id)

    def encode_chat(self, messages: list[Message]) -> list[int]:
        """Token ids of a conversation, ready for the answer; contents are literal text, whatever they spell."""
        if self._template is None:
            return self.encode_literal("\n".join(m["content"] for m in messages))
        if not any(token in m["content"] for token in self._special for m in messages):
            return list(self._tokenizer.encode(self._render(messages), add_special_tokens=False).ids)
        # Contents stand in the template as marks, so that template and content are encoded each in its own way.
        marks = [f"\ue000{i}\ue001" for i in range(len(messages))]
        rest = self._render([{**m, "content": mark} for m, mark in zip(messages, marks, strict=True)])
        ids: list[int] = []
        for message, mark in zip(messages, marks, strict=True):
            before, found, rest = rest.partition(mark)
            ids += self._tokenizer.encode(before, add_special_tokens=False).ids
            if found:
                ids += self.encode_literal(message["content"])
        return ids + list(self._tokenizer.encode(rest, add_special_tokens=False).ids)

    def encode_literal(self, text: str) -> list[int]:
        """Token ids of text in which special tokens are plain characters."""
        return list(self._literal.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: list[int]) -> str:
        """Text of token ids, special tokens left out."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def _render(self, messages: list[Message]) -> str:
        assert self._template is not None
        given: dict[str, Any] = {"messages": messages, "add_generation_prompt": True, "bos_token": "",
                                 "eos_token": self._eos_token}
        try:
            return self._template.render(**given)
        except (TemplateError, KeyError, TypeError) as error:
            raise RequestError(f"The chat template refuses the messages: {error}.") from None


class TextStream:
    """Text of a growing answer, in pieces that add up to the whole."""

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec
        self._ids: list[int] = []
        self._shown = 0

    def push(self, ids: list[int], last: bool) -> str:
        """The new piece of text; a character whose bytes are not all there yet waits for the rest."""
        self._ids += ids
        # All of it is decoded each time: a token's text can depend on the one before it.
        text = self._codec.decode(self._ids)
        if not last:
            text = text.rstrip("\ufffd")
        piece = text[self._shown:]
        self._shown = max(self._shown, len(text))
        return piece
