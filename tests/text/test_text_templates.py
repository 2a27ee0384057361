"""Chat templates: transformers' environment, its limits here, and every error as one sentence."""

from __future__ import annotations

import json
import time
from datetime import datetime

import pytest

from dmoe_export.errors import RequestError
from dmoe_export.text.messages import plain_messages
from dmoe_export.text.templates import ChatTemplate

ASK = [{"role": "user", "content": "a<b & 'c' ü"}]


def _render(source, messages=ASK, **special):
    return ChatTemplate(source, special).render(messages)


@pytest.mark.parametrize(("source", "expected"), [
    ("{{ messages[0] | tojson }}", json.dumps(ASK[0], ensure_ascii=False)),
    ("{{ {'b': 1, 'a': 'ü'} | tojson(ensure_ascii=true, indent=1) }}", '{\n "b": 1,\n "a": "\\u00fc"\n}'),
    ("{{ {'b': 1, 'a': 2} | tojson(separators=(',', ':'), sort_keys=true) }}", '{"a":2,"b":1}'),
    ("{{ tools is none }} {{ documents is none }} {{ add_generation_prompt }}", "True True True"),
    ("[{{ bos_token }}{{ pad_token }}]{{ pad_token is defined }}", "[<s>]False"),
    ("{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}{% if i > 2 %}{% break %}{% endif %}{{ i }}"
     "{% endfor %}", "02"),
    ("{% generation %}{% set x = 1 %}{{ messages[0].role }}{% endgeneration %}{{ x }}", "user"),
    ("  {% if true %}\nx\n  {% endif %}\ny", "x\ny"),
    ("{% for m in messages %}{{ loop.length ~ loop.last ~ none ~ 1.5 }}{% endfor %}", "1TrueNone1.5"),
    ("{{ [1, 'a', none] | join('-') }}{{ messages | map(attribute='role') | join }}{{ 'aXa' | replace('a', 'b', 1) }}",
     "1-a-NoneuserbXa"),
    ("{{ messages | join(',', attribute='role') }}{% for x in nothing %}{% else %}none{% endfor %}", "usernone"),
    ("{% set ns = namespace(a='x') %}{% for c in 'abc' %}{% set ns.a = ns.a ~ c %}{% endfor %}{{ ns.a }}", "xabc"),
    ("{{ '%s is %d' % ('a', 5) }} {{ '{:>5}'.format('x') }} {{ 2 ** 10 }} {{ 'ab' * 3 }}", "a is 5     x 1024 ababab"),
])
def test_as_transformers_renders(source, expected):
    assert _render(source, bos_token="<s>") == expected


def test_time_is_the_local_one_and_stands_still():
    template = ChatTemplate("{{ strftime_now('%d %b %Y %H:%M:%S') }}", {})
    assert template.render(ASK, datetime(2026, 11, 28, 1, 2, 3)) == "28 Nov 2026 01:02:03"


@pytest.mark.parametrize(("source", "words"), [
    ("{{ raise_exception('roles must\\nalternate') }}", "messages: roles must alternate."),
    ("{{ 1 / 0 }}", "ZeroDivisionError"), ("{{ messages[0].content.index('zzz') }}", "ValueError"),
    ("{{ {}['a'].b }}", "undefined|no attribute"), ("{{ 'a' + 1 }}", "TypeError"),
    ("{{ {'a b': 1} | xmlattr }}", "Invalid character"),
    ("{{ 10 ** 5000 }}", "4300 digits"), ("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", "RecursionError"),
    ("{% for i in range(1000000000) %}{% endfor %}", "Range too big"), ("{{ 10 ** 99999999 }}", "bits"),
    ("{% set a = [7 ** 9999] %}{% set b = a[0] * a[0] * a[0] * a[0] %}{{ b * b * b }}", "bits"),
    ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "turns of loops"),
    ("{{ 'a' * (10 ** 16 * messages | length) }}", "characters or items"),
    ("{{ ['a'] * 10 ** 9 }}", "characters or items"),
    ("{% set ns = namespace(s='ab') %}{% for i in range(64) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}", "of 4194304"),
    ("{% set ns = namespace(s='ab') %}{% for i in range(64) %}{% set ns.s = ns.s + ns.s %}{% endfor %}", "of 4194304"),
    ("{% set ns = namespace(s='ab') %}{% for i in range(64) %}{% set x %}{{ ns.s }}{{ ns.s }}{% endset %}"
     "{% set ns.s = x %}{% endfor %}", "puts out more"),
    ("{% set a = 'a' * 3999999 %}{{ ([a] * 999) | join }}", "characters or"),
    ("{{ 'a'.join(['b' * 3999999] * 9) }}", "or items"),
    ("{{ ('a' * 99999).replace('a', 'b' * 99999) }}", "or items"),
    ("{{ ('a' * 99999) | replace('a', 'b' * 99999) }}", "or items"),
    ("{{ 'a'.center(10 ** 9) }}", "width"), ("{{ 'a' | center(10 ** 9) }}", "width"),
    ("{{ '%99999999d' % 1 }}", "width"),
    ("{{ '%*d' % (10 ** 9, 1) }}", "width"), ("{{ '{:>99999999}'.format(1) }}", "width"),
    ("{{ '{:>{}}'.format(1, 10 ** 9) }}", "width"), ("{{ [1] | tojson(indent=10 ** 9) }}", "width"),
    ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ("{{ messages.append(1) }}", "unsafe"), ("{{ lipsum(n=9999) }}", "undefined"),
    ("{% for %}", "no valid template"), ("{{" + "(" * 3000 + "1" + ")" * 3000 + "}}", "no valid template"),
    ("{% include 'x' %}", "loader"), ("{{ x | nosuchfilter }}", "no valid template.*nosuchfilter"),
])
def test_every_error_is_one_sentence_soon(source, words):
    start = time.perf_counter()
    with pytest.raises(RequestError, match=words) as caught:
        _render(source)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
    assert time.perf_counter() - start < 60  # not a measurement: without a bound these take hours


@pytest.mark.parametrize(("message", "words"), [
    ({"role": "user"}, "needs the texts role and content"), ({"role": "user", "content": None}, "needs the texts"),
    ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "part of type 'image_url'"),
    ("hello", "needs the texts"), ({"role": "a\ud800", "content": "x"}, "half a character"),
    ({"role": "user", "content": "a\udfff"}, "half a character"),
    ({"role": "user", "content": "x", "name": "\ud800"}, "half a character"),
    ({"role": "user", "content": "x", "tool_calls": [{"function": {"arguments": {"\ud800": 1}}}]}, "half a character"),
    ({"role": "user", "content": "x", "n": object()}, "value of type object"),
    ({"role": "user", "content": "x", 5: 1}, "key 5"),
    ({"role": "user", "content": "x", "n": json.loads("[" * 60 + "]" * 60)}, "levels deep"),
])
def test_messages_that_are_no_plain_texts(message, words):
    with pytest.raises(RequestError, match=words):
        plain_messages([message])


def test_a_content_in_parts_is_one_text():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert plain_messages([{"role": "user", "content": parts}]) == [{"role": "user", "content": "a\nb"}]
    for wrong in ([{"type": "text"}], [{"type": "text", "text": None}], ["a"], [{"type": "input_audio"}], [None]):
        with pytest.raises(RequestError, match="A message has a part of type"):
            plain_messages([{"role": "user", "content": wrong}])


def test_fields_without_a_value_are_left_out():
    assert plain_messages([{"role": "user", "content": "x", "tool_calls": None}]) == [{"role": "user", "content": "x"}]
