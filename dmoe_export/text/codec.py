"""Text in and out: tokenizer and chat template of a bundle."""

from __future__ import annotations

import json
import logging
import time
from datetime import datetime
from functools import cached_property, lru_cache
from pathlib import Path

from ..bundle.reader import Bundle
from ..errors import BundleError, RequestError
from ..guards.regular_file import MOST_CONFIG, MOST_TABLE, read_regular
from ..guards.tokenizer import GuardedTokenizer, no_panics, one_request
from .literal import LiteralEncoder
from .messages import Message, check_text, plain_messages, short
from .own_tokens import OwnTokens
from .spelling import TokenBytes
from .stream import Tail, TextStream
from .switches import Switches
from .templates import ChatTemplate

__all__ = ["Message", "TextCodec", "TextStream"]

# LLaDA2's own chat text, for checkpoints that carry its control tokens but no template.
_LLADA2_TEMPLATE = (
    "{% for m in messages %}<role>{{ {'system': 'SYSTEM', 'user': 'HUMAN', 'assistant': 'ASSISTANT'}[m['role']] }}"
    "</role>{{ m['content'] }}<|role_end|>{% endfor %}{% if add_generation_prompt %}<role>ASSISTANT</role>{% endif %}")
_MOST_ROLES = 8  # looked at in one request
_SPELLED = 1 << 16  # tokens whose spelling is remembered, and shared by all who hold it
_QUICK = 0.2  # seconds of a rendering that may be done again to see what changes
_log = logging.getLogger(__name__)
_LLADA2_TOKENS = {"<role>", "</role>", "<|role_end|>"}


class TextCodec:
    """Tokenizer and chat template of a bundle; docs/text.md says what they do with prompts."""

    def __init__(self, tokenizer_file: Path, template: str | None, eos_id: int | None = None,
                 special_tokens: dict[str, str] | None = None) -> None:
        """`template`: chat template source; None picks LLaDA2's when its tokens are known, else plain prompts.

        `special_tokens`: what a template knows by name (bos_token, …). Without any, as in older bundles, `eos_id` names
        the token that it knows as `eos_token`. Raises BundleError for a file that is no tokenizer.
        """
        with no_panics(lambda why: BundleError(f"{tokenizer_file} cannot be read as a tokenizer: {why}.")):
            content = json.loads(read_regular(tokenizer_file, MOST_TABLE).decode("utf-8"))
            self._guarded = GuardedTokenizer(content)
            self._tokenizer = self._guarded.raw
            self.tail, self._bytes = Tail(content.get("decoder")), TokenBytes(content.get("decoder"))
            model = {key: content["model"].get(key) for key in ("unk_token", "unk_id", "byte_fallback")}
            self._literal = LiteralEncoder(self._guarded, {k: v for k, v in model.items() if v is not None})
        self.spelling = lru_cache(_SPELLED)(self._spelling)
        self._seen_roles: set[str] = set()
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = {i for i, token in added.items() if token.special}
        if template is None and {token.content for token in added.values()} >= _LLADA2_TOKENS:
            template = _LLADA2_TEMPLATE
        if not special_tokens:
            eos = None if eos_id is None else self._tokenizer.id_to_token(eos_id)
            special_tokens = {"bos_token": "", "eos_token": eos or ""}
        self._template = ChatTemplate(template, special_tokens) if template is not None else None

    @classmethod
    def of(cls, bundle: Bundle) -> TextCodec | None:
        """The codec of a bundle, or None when it has no tokenizer."""
        entry = bundle.manifest.tokenizer
        if entry is None:
            return None
        template = None
        if entry.chat_template:
            file = bundle.folder / entry.chat_template
            try:
                template = read_regular(file, MOST_CONFIG).decode("utf-8")
            except (OSError, ValueError) as error:
                raise BundleError(f"{file} cannot be read as a chat template: {error}.") from None
        return cls(bundle.folder / entry.file, template, bundle.manifest.model.eos_id, entry.special_tokens)

    def encode_chat(self, messages: list[Message], switches: Switches | None = None) -> list[int]:
        """Token ids of a conversation, ready for the answer; what messages spell is text and never a control token.

        Where nothing in them spells one, these are the ids of transformers' `apply_chat_template`, which takes
        `switches` as further keywords. Raises RequestError for messages that are no plain texts, for switches that mean
        nothing to the template, and for whatever it raises.
        """
        messages = plain_messages(messages)
        if self._template is None:
            if switches:
                raise RequestError(f"chat_template_kwargs is {short(dict(switches))}, but the bundle has no chat "
                                   "template to read it; leave it out.")
            return self.encode_plain("\n".join(m["content"] for m in messages))
        with one_request():
            return self._encode_chat(self._template, messages, switches)

    def _encode_chat(self, template: ChatTemplate, messages: list[Message], switches: Switches | None) -> list[int]:
        now, start = datetime.now(), time.monotonic()
        text = template.render(messages, now, switches)
        if time.monotonic() - start < _QUICK:
            self._tell_of_dropped(template, messages, text, now, switches)
        ids = list(self._guarded.encode(text).ids)
        if not any(i in self._literal.control for i in ids):
            return ids
        own = self._own_tokens.find(messages, text, now, switches)
        wanted = self._literal.control_ids([place.id for place in own])
        if own == self._literal.own_tokens(text) and wanted == self._literal.control_ids(ids):
            return ids
        return self._literal.encode(text, own)

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of a text as the tokenizer begins and ends one (a BOS, if it has one); control tokens are text."""
        check_text(text)
        return self._literal.encode(text, add_special_tokens=True)

    def encode_literal(self, text: str) -> list[int]:
        """Token ids of text in which control tokens are plain characters, and nothing is added."""
        check_text(text)
        return self._literal.encode(text)

    def decode(self, ids: list[int]) -> str:
        """Text of token ids, special tokens left out."""
        return self._guarded.decode(ids)

    def token(self, id_: int) -> str | None:
        """A token's name; None for a special or unknown one, which decoding leaves out."""
        return None if id_ in self._special else self._tokenizer.id_to_token(id_)

    def _spelling(self, id_: int) -> tuple[str, bytes | None]:
        """A token as it is shown, and what it adds to a text in UTF-8; None: that depends on its neighbours.

        A special token goes by its name and adds nothing; U+FFFD stands for a part of a character.
        """
        added = self.added_bytes(id_)
        if added is None:
            return self.decode([id_]), None
        return added.decode("utf-8", "replace") or self._tokenizer.id_to_token(id_) or "", added

    @property
    def loses_blank(self) -> bool | None:
        """Whether a text loses one blank that it begins with; None where it may lose more, or else."""
        return self._bytes.loses_blank

    def added_bytes(self, id_: int) -> bytes | None:
        """What a token adds to a text, in UTF-8; b"" of a special or unknown one, None where its neighbours count."""
        name = self._tokenizer.id_to_token(id_)  # the model may have more tokens than the tokenizer
        return b"" if id_ in self._special or not name else self._bytes.of(name)

    def _tell_of_dropped(self, template: ChatTemplate, messages: list[Message], text: str, now: datetime,
                         switches: Switches | None) -> None:
        """Log a warning, once, for a role whose messages the template leaves out: nothing changes with them."""
        roles = list(dict.fromkeys(m["role"] for m in messages if m["content"].strip()))
        for role in [role for role in roles if role not in self._seen_roles][:_MOST_ROLES]:
            changed = [m | {"content": f"x {m['content']} x"} if m["role"] == role else m for m in messages]
            try:
                left_out = template.render(changed, now, switches) == text
            except RequestError:  # it looks at them
                left_out = False
            if left_out:
                _log.warning("The chat template leaves out what messages of role %r say.", role)
            self._seen_roles.add(role)

    @cached_property
    def _own_tokens(self) -> OwnTokens:
        assert self._template is not None
        return OwnTokens(self._template, self._literal)

    def _render(self, messages: list[Message]) -> str:
        assert self._template is not None
        return self._template.render(plain_messages(messages))
