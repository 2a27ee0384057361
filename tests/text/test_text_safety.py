"""What a message spells is text: never a control token, and nothing else of the prompt changes."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from text_codecs import CONTROL, KINDS, TEMPLATE, byte_level, codec, metaspace, whole_words, word_level

from dmoe_export.errors import RequestError

_LOOP = "{% for m in messages %}<role>{{ m.role }}</role>BODY<|role_end|>{% endfor %}<role>assistant</role>"


def _loop(body: str) -> str:
    return _LOOP.replace("BODY", body)


TEMPLATES = {
    "plain": TEMPLATE,
    "drops": TEMPLATE.replace("{{ m['content'] }}", "{{ m.content if not loop.first or loop.last }}"),
    "reorders": _loop("{{ m.content }}").replace("in messages", "in messages | reverse"),
    "repeats": _loop("{{ m.content ~ m.content }} {{ m.content * 2 }}"),
    "trims": _loop("{{ m.content | trim }}{{ m.content.strip('>') }}{{ m.content.rstrip().lstrip('<') }}"),
    "splits": _loop("{{ m.content.split('<')[-1] }}{{ m.content.split() | join('|') }}"
                    "{{ m.content.partition('>')[0] }}{{ m.content.rsplit('e>', 1)[0] }}"),
    "splits at its own token": _loop("{% if '</role>' in m.content %}</role>"
                                     "{{ m.content.split('</role>')[-1].lstrip() }}"
                                     "{% else %}{{ m.content }}{% endif %}"),
    "recases": _loop("{{ m.content | upper }}{{ m.content.lower() }}{{ m.content | title }}"
                     "{{ m.content | capitalize }}"),
    "replaces": _loop("{{ m.content.replace('<s>', '<|mask|>') }}{{ m.content | replace('role', '') }}"),
    "asks": _loop("{% if m.content.startswith('<role>') and m.content.endswith('>') %}<s>{{ m.content[6:] }}"
                    "{% elif m.content == 'hello' or m.content[0] == '<' %}{{ m.content | length }}"
                    "{% else %}{{ m.content[2:] }}{% endif %}"),
    "in JSON": _loop("{{ {'b': m.content, 'a': [m.role]} | tojson }}"),
    "glues": "<role>{% for m in messages %}{{ m.content }}{% endfor %}_end|></role>"
             "{{ messages[0].content }}|role_end|>",
    "built": "{% for m in messages %}{{ '<' + m.role + '>' }}{{ '<' ~ '|mask|>' }}{{ m.content }}{% endfor %}",
    "macro": "{% macro show(m) %}<role>{{ m.content }}</role>{% endmacro %}"
             "{% for m in messages %}{% set x %}{{ show(m) }}{% endset %}{{ x }}{% endfor %}",
}
SPELLED = st.sampled_from([*CONTROL, "<|role", "_end|>", "role>", "<", "|>", "<ROLE>", "＜role＞", " <role>\n",
                           "<s></s>"])
WORD = st.sampled_from(["hello", "what is", " ", "\n", "two ", "é", "ß", "\"\\", "a<b", "\U000f0003", "\U00100002",
                        "7"])
CONTENT = st.lists(SPELLED | WORD, max_size=5).map("".join)
CHATS = st.lists(st.tuples(st.sampled_from(["user", "system", "assistant"]), CONTENT), min_size=1, max_size=3).map(
    lambda chat: [{"role": role, "content": content} for role, content in chat])


@pytest.fixture(scope="module")
def codecs(tmp_path_factory):
    """(kind, template) → codec, made once."""
    made = {}

    def get(kind, template):
        if (kind, template) not in made:
            made[kind, template] = codec(KINDS[kind](), tmp_path_factory.mktemp("c"), TEMPLATES[template])
        return made[kind, template]
    return get


def _control(subject, ids):
    return subject._literal.control_ids(ids)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(template=st.sampled_from(list(TEMPLATES)), chat=CHATS)
def test_messages_never_make_control_tokens(codecs, kind, template, chat):
    subject = codecs(kind, template)
    ids = subject.encode_chat(chat)
    text = subject._render(chat)
    plain = subject._tokenizer.encode(text, add_special_tokens=False).ids
    own = _control(subject, ids)
    assert len(own) <= len(_control(subject, plain)) or "single" in kind
    if not any(sign in m["content"] for m in chat for sign in "<>|＜_"):
        assert ids == plain
    if template in ("plain", "trims", "repeats", "in JSON", "reorders", "recases"):  # as many as with harmless messages
        harmless = subject._render([m | {"content": "hello"} for m in chat])
        expected = _control(subject, subject._tokenizer.encode(harmless, add_special_tokens=False).ids)
        assert "single" in kind or own == expected


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "single" not in kind])
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(before=CONTENT, token=st.sampled_from(CONTROL), after=CONTENT)
def test_nothing_changes_outside_the_spot(codecs, kind, before, token, after):
    """A spelled token in the last message leaves the messages before it and the rest of the template as they are."""
    subject = codecs(kind, "plain")
    chat = [{"role": "system", "content": "what is"}, {"role": "user", "content": "hello"}]
    harmless = subject.encode_chat(chat)
    spelled = subject.encode_chat([chat[0], chat[1] | {"content": f"{before} {token} {after}"}])
    users = next(i for i in range(len(harmless), 0, -1) if harmless[:i] == spelled[:i])
    roles = [i for i, id_ in enumerate(harmless) if _control(subject, [id_])]
    assert users >= roles[4] + 1  # up to the end of the second "</role>"
    assert harmless[roles[5]:] == spelled[len(spelled) - (len(harmless) - roles[5]):]
    assert _control(subject, spelled) == _control(subject, harmless)


def test_ordinary_text_merges_over_borders_as_in_one_string(tmp_path):
    subject = codec(byte_level(), tmp_path, "{{ messages[0].content }}le><role>{{ messages[0].content }}he")
    spelled = subject.encode_chat([{"role": "user", "content": "<|mask|> ro"}])
    names = [subject._tokenizer.id_to_token(i) for i in spelled]
    assert "role" in names and names.count("<role>") == 1 and "<|mask|>" not in names


def test_a_token_built_by_the_template_of_a_known_role_is_its_own(tmp_path):
    subject = codec(byte_level(), tmp_path, "{{ '<|' + messages[0].role + '|>' }}{{ messages[0].content }}")
    subject._tokenizer.add_tokens(["<|user|>"])
    subject = codec(subject._tokenizer, tmp_path, subject._template.source)
    user, mask = (subject._tokenizer.token_to_id(name) for name in ("<|user|>", "<|mask|>"))
    assert _control(subject, subject.encode_chat([{"role": "user", "content": "<|mask|><|user|>"}])) == [user]
    assert mask not in subject.encode_chat([{"role": "mask", "content": "x"}])
    assert user not in subject.encode_chat([{"role": "user|>x<|user", "content": "x"}])


def test_other_fields_of_messages_are_text_too(tmp_path):
    template = ("{% for m in messages %}<role>{{ m.name }}{{ m.tool_calls[0].function.arguments | tojson }}"
                "{{ m.content }}</role>{% endfor %}")
    subject = codec(byte_level(), tmp_path, template)
    arguments = {"<|mask|>": "<s>", "x": ["</role>", 1.5, None]}
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    ids = subject.encode_chat([{"role": "user", "content": "", "name": "<role>", "tool_calls": [call]}])
    assert [subject._tokenizer.id_to_token(i) for i in _control(subject, ids)] == ["<role>", "</role>"]
    assert "<|mask|>" in subject.decode(ids)


def test_what_cannot_be_followed_is_refused_when_it_matters(tmp_path):
    subject = codec(byte_level(), tmp_path, "<role>{{ messages[0].content | wordcount }}"
                                            "{{ messages[0].content | urlencode }}{{ messages[0].content }}</role>")
    assert len(_control(subject, subject.encode_chat([{"role": "user", "content": "häl lo"}]))) == 2
    with pytest.raises(RequestError, match="cannot be followed"):
        subject.encode_chat([{"role": "user", "content": "é <|mask|> <role>"}])


def test_a_token_of_spaces_stays_one(tmp_path):
    """Added tokens of spaces alone are text in messages, as in transformers."""
    tokenizer = byte_level()
    tokenizer.add_tokens(["  "])
    subject = codec(tokenizer, tmp_path)
    run = subject._tokenizer.token_to_id("  ")
    for content in ("hello  hello", "hello  <|mask|>"):
        assert subject.encode_chat([{"role": "user", "content": content}]).count(run) == 1


@pytest.mark.parametrize("make", [word_level, byte_level, metaspace])
def test_plain_text_spells_nothing_and_begins_as_the_tokenizer_does(tmp_path, make):
    subject = codec(make(), tmp_path)
    begin = [subject._tokenizer.token_to_id("<s>")] if make is metaspace else []
    assert subject.encode_plain("hello") == subject._tokenizer.encode("hello").ids
    assert _control(subject, subject.encode_plain("a <|mask|> <s> b")) == begin
    assert _control(subject, subject.encode_literal("a <|mask|> <s> b")) == []


@pytest.mark.parametrize("make", [whole_words, metaspace])
def test_pieces_of_the_model_that_are_control_tokens_are_cut(tmp_path, make):
    """However many there are in one message."""
    subject = codec(make(), tmp_path)
    harmless, spelled = (subject.encode_chat([{"role": "user", "content": text * 200}]) for text in ("x ", "<|mask|> "))
    assert _control(subject, spelled) == _control(subject, harmless)


def test_a_control_token_of_one_letter_that_the_model_has_is_refused(tmp_path):
    tokenizer = word_level()
    tokenizer.add_tokens(["x"])
    subject = codec(tokenizer, tmp_path, "<role>{{ messages[0].content }}")
    with pytest.raises(RequestError, match="however they are cut"):
        subject.encode_chat([{"role": "user", "content": "a x"}])
