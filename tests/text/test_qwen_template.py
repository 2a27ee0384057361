"""A chat template of Qwen3's shape, which SDAR's checkpoints bring: turns, thinking, tools, and where an answer ends.

No copy of the published file was at hand: this one has its constructs (a namespace, messages from behind, `is string`,
texts cut at `</think>`, neighbours by `loop.index0`) and puts out the same turns.
"""

from __future__ import annotations

import pytest
from text_codecs import byte_level
from tokenizers import AddedToken

from dmoe_export.text.codec import TextCodec
from dmoe_export.text.templates import ChatTemplate

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
