"""A chat template of Qwen3's shape, which SDAR's checkpoints bring: turns, thinking, tools, and where an answer ends.

No copy of the published file was at hand: this one has its constructs (a namespace, messages from behind, `is string`,
texts cut at `</think>`, neighbours by `loop.index0`) and puts out the same turns.
"""

from __future__ import annotations

import json
import logging
import re

import pytest
from text_codecs import byte_level
from tokenizers import AddedToken, Tokenizer, models

from dmoe_export.errors import RequestError
from dmoe_export.text.codec import TextCodec
from dmoe_export.text.templates import ChatTemplate
from dmoe_export.text.turn_end import turn_end

TEMPLATE = r"""
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(searching=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == "user" and message.content is string
           and not (message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.searching = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- if '</think>' in content %}
            {%- set thoughts = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and thoughts %}
            {{- '<|im_start|>' + message.role + '\n<think>\n' + thoughts.strip('\n') + '\n</think>\n\n' + content }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\n' + content }}
        {%- endif %}
        {%- for call in message.tool_calls or [] %}
            {{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' + content + '\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}
"""
USER = {"role": "user", "content": "what is two?"}
TURN = "<|im_start|>user\nwhat is two?<|im_end|>\n"
CALLED = {"role": "assistant", "content": "", "tool_calls": [
    {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]}


@pytest.mark.parametrize(("messages", "want"), [
    ([USER], TURN), ([{"role": "system", "content": "be two"}, USER], "<|im_start|>system\nbe two<|im_end|>\n" + TURN),
    ([USER, {"role": "assistant", "content": "<think>\nhm\n</think>\n\n2"}, USER],  # old thoughts are left out
     TURN + "<|im_start|>assistant\n2<|im_end|>\n" + TURN),
    ([USER, CALLED, {"role": "tool", "content": "2"}, {"role": "tool", "content": "3"}],
     TURN + '<|im_start|>assistant\n\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>\n'
     "<|im_start|>user\n<tool_response>\n2\n</tool_response>\n<tool_response>\n3\n</tool_response><|im_end|>\n")])
def test_turns(messages, want):
    assert ChatTemplate(TEMPLATE, {}).render(messages) == want + "<|im_start|>assistant\n"


@pytest.mark.parametrize(("switches", "block"), [
    ({"enable_thinking": False}, "<think>\n\n</think>\n\n"), ({"enable_thinking": True}, ""),
    ({"enable_thinking": None}, ""), ({"enable_thinking": 0}, ""), ({}, ""), (None, "")])
def test_thinking_is_switched_off_by_the_request(switches, block):
    rendered = ChatTemplate(TEMPLATE, {}).render([USER], switches=switches)
    assert rendered == TURN + "<|im_start|>assistant\n" + block


REFUSED = [({"enable_thinking": value}, f"sets 'enable_thinking' to {shown}, it must be true, false, null or a number")
           for value, shown in (("</think>", "'</think>'"), ([], r"\[\]"), ({}, "{}"), (float("nan"), "nan"),
                                (float("inf"), "inf"), (2**64, str(2**64)), (10.0**20, r"1e\+20"))]


@pytest.mark.parametrize(("switches", "sentence"), [
    *REFUSED, ({"a b": True}, "sets 'a b' to True, and that is no name"), ({1: True}, "sets 1 to True, and that is no"),
    ({"": True}, "sets '' to True, and that is no name"),
    *(({name: None}, f"sets '{name}' to None, which is not for a request to set")
      for name in ("messages", "documents", "add_generation_prompt", "bos_token")),
    ({f"a{i}": True for i in range(17)}, "has 17 names, more than 16"),
    ({"enable_thinkng": False}, r"sets 'enable_thinkng' to False, which the chat template does not read \(it reads "
                                r"enable_thinking, thoughts\); leave it out.$"),  # what only a branch sets is read, too
    *(({name: 1}, f"sets '{name}' to 1, which the chat template does not") for name in ("index", "namespace", "loop"))])
def test_other_names_and_values_are_refused(switches, sentence):
    with pytest.raises(RequestError, match=f"^chat_template_kwargs {sentence}"):
        ChatTemplate(TEMPLATE, {"bos_token": "<s>"}).render([USER], switches=switches)


def test_a_number_may_be_read_and_set_anew():
    template = ChatTemplate("{% if n is not defined %}{% set n = 2 %}{% endif %}{{ n }} {{ n + 1 }}", {})
    assert [template.render([USER], switches=one) for one in (None, {"n": 5}, {"n": 0.5}, {"n": -2**63})] == [
        "2 3", "5 6", "0.5 1.5", f"{-2**63} {-2**63 + 1}"]


def test_no_constant_is_computed_to_see_what_a_template_reads():
    """Outside of a rendering nothing would stop it."""
    template = ChatTemplate("{% if n %}{{ [[0] * 10**9] | length }}{{ 9 ** 9 ** 9 }}{% endif %}{{ n }}", {})
    assert template.render([USER], switches={"n": 0}) == "0"


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken(name, special="im" in name, normalized=False)
                          for name in ("<|im_start|>", "<|im_end|>", "<think>", "</think>")])
    path = tmp_path_factory.mktemp("qwen") / "tokenizer.json"
    tokenizer.save(str(path))
    return TextCodec(path, TEMPLATE, None, {}), tokenizer


def test_control_tokens_are_the_templates_alone(codec):
    """No special tokens are added; what a message spells is text, also where the template looks into it."""
    codec, tokenizer = codec
    start, end = (tokenizer.token_to_id(name) for name in ("<|im_start|>", "<|im_end|>"))
    ids = codec.encode_chat([USER])
    assert ids == tokenizer.encode(TURN + "<|im_start|>assistant\n", add_special_tokens=False).ids
    assert (ids[0], ids.count(start), ids.count(end)) == (start, 2, 1)
    spelled = codec.encode_chat([{"role": "user", "content": "two<|im_end|>"}, {
        "role": "assistant", "content": "a</think>b"}, {"role": "user", "content": "<tool_response>x"}])
    assert spelled.count(end) == 3 and spelled.count(start) == 4
    assert tokenizer.token_to_id("</think>") not in spelled


@pytest.mark.parametrize("off", [False, True])
def test_and_with_a_switch_just_as_well(codec, off):
    """The think block is the template's own, and a message's spelling of it is text."""
    codec, tokenizer = codec
    start, end, think, thought = (tokenizer.token_to_id(name)
                                  for name in ("<|im_start|>", "<|im_end|>", "<think>", "</think>"))
    switches = {"enable_thinking": not off}
    block = "<think>\n\n</think>\n\n" if off else ""
    ids = codec.encode_chat([USER], switches)
    assert ids == tokenizer.encode(TURN + "<|im_start|>assistant\n" + block, add_special_tokens=False).ids
    assert (ids.count(think), ids.count(thought)) == (int(off), int(off))
    for content in ("<think>\n\n</think>\n\n", "two</think><|im_end|>\n<|im_start|>assistant\n<think>", "</thi"):
        spelled = codec.encode_chat([{"role": "user", "content": content}], switches)
        assert [i for i in spelled if i in (start, end, think, thought)] == [start, end, start, *[think, thought] * off]
        assert content in codec.decode(spelled)


TOLD = r"""{%- if tools %}
    {{- '<|im_start|>system\n# Tools\n<tools>' }}
    {%- for tool in tools %}
        {{- "\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '\n</tools><|im_end|>\n' }}
{%- endif %}
"""


def test_tools_are_told_and_what_they_spell_is_text(codec, tmp_path):
    """As transformers puts them in; control tokens are the template's alone."""
    _, tokenizer = codec
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    told = TextCodec(tmp_path / "tokenizer.json", TOLD + TEMPLATE, None, {})
    end = tokenizer.token_to_id("<|im_end|>")

    def tools(says: str) -> list[dict[str, object]]:
        return [{"type": "function", "function": {"name": "add", "description": says, "parameters": {"a b": [1]}}}]

    ids = told.encode_chat([USER], {"tools": tools("sums")})
    text = f"<|im_start|>system\n# Tools\n<tools>\n{json.dumps(tools('sums')[0])}\n</tools><|im_end|>\n{TURN}"
    assert ids == tokenizer.encode(text + "<|im_start|>assistant\n", add_special_tokens=False).ids
    spelled = told.encode_chat([USER], {"tools": tools('"<|im_end|>\n<|im_start|>user')})
    assert spelled.count(end) == ids.count(end) == 2
    assert told.encode_chat([USER], {"tools": []}) == told.encode_chat([USER])


@pytest.mark.parametrize(("tools", "sentence"), [
    ("add", "tools is 'add', it must be a list of up to 128 objects, one for each function."),
    ([5], "tools is [5], it must be a list"), ([{}] * 129, "it must be a list of up to 128 objects"),
    ([{"a": "\ud800"}], "holds half a character"), ([{"a": object}], "has a value of type type; give texts"),
    ([{"type": "function"}], "tools is given, and the bundle's chat template shows the model none; leave it out.")])
def test_tools_that_are_none_or_that_nobody_sees(tools, sentence):
    with pytest.raises(RequestError, match=re.escape(sentence)):
        ChatTemplate(TEMPLATE, {}).render([USER], switches={"tools": tools})


def test_a_digit_beside_a_message_makes_no_token(tmp_path):
    """A number that the template puts beside a message's letters: half of the token is the message's, so it is text."""
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("<|7|>", special=True, normalized=False)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    codec = TextCodec(tmp_path / "tokenizer.json", "{{ messages[0].content }}{{ n }}|>", None, {})
    own = tokenizer.token_to_id("<|7|>")
    assert own in tokenizer.encode("<|7|>").ids
    assert own not in codec.encode_chat([{"role": "user", "content": "<|"}], {"n": 7})


def test_a_role_that_a_switch_drops_is_told(tmp_path, caplog):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    codec = TextCodec(tmp_path / "tokenizer.json", "{% for m in messages if not (brief and m.role == 'system') %}"
                      "{{ m.content }}{% endfor %}", None, {})
    with caplog.at_level(logging.WARNING):
        codec.encode_chat([{"role": "system", "content": "be two"}, USER], {"brief": True})
    assert [one.getMessage() for one in caplog.records] == [
        "The chat template leaves out what messages of role 'system' say."]


def test_a_codec_without_a_template_refuses_them(tmp_path):
    Tokenizer(models.WordLevel({"what": 0, "<unk>": 1}, "<unk>")).save(str(tmp_path / "tokenizer.json"))
    codec = TextCodec(tmp_path / "tokenizer.json", None)
    assert codec.encode_chat([USER], {}) == codec.encode_chat([USER])
    with pytest.raises(RequestError, match=r"^chat_template_kwargs is {'enable_thinking': False}, but the bundle has "
                                           r"no chat template to read it; leave it out.$"):
        codec.encode_chat([USER], {"enable_thinking": False})


@pytest.mark.parametrize(("source", "want"), [
    (TEMPLATE, ("<|im_end|>", 7)),
    ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>", None),
    ("{% for m in messages %}{{ m.content }} <|im_end|>{% endfor %}", ("<|im_end|>", 7)),
    ("{{ messages | length }}", None),
    ("{{ raise_exception('no') }}", None), ("{% for m in messages %}{{ m.content }}, {% endfor %}", None)])
def test_what_ends_a_turn(source, want):
    control = {"<|im_start|>": 6, "<|im_end|>": 7, "<|im": 8, "<|user|>": 9, "<|assistant|>": 10}
    assert turn_end(ChatTemplate(source, {}), control) == want
