"""Chat templates that grow or go on where no loop is seen: in one call, in lists of lists, while they are compiled."""

from __future__ import annotations

import time

import pytest

from dmoe_export.errors import RequestError
from dmoe_export.text import template_limits
from dmoe_export.text.templates import ChatTemplate

ASK = [{"role": "user", "content": "hello"}]


def doubled(use):
    """A list of 2^40 letters, in 40 small lists."""
    return ("{% set ns = namespace(l=['aaaaaaaa']) %}{% for i in range(40) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}"
            + use)


TOO_MUCH = {
    **{f"doubled: {use}": doubled(use) for use in (
        "{{ ns.l }}", "{{ ns.l | string | length }}", "{{ ns.l | tojson }}", "{{ ns.l == [ns.l] }}",
        "{{ '%s' % ns.l }}", "{{ '{}'.format(ns.l) }}", "{{ ns.l | join }}", "{{ ns.l ~ '' }}", "{{ ns.l | pprint }}")},
    "doubled in a namespace": "{% set ns = namespace(l=['aaaaaaaa']) %}{% for i in range(40) %}"
                              "{% set ns.l = [namespace(l=ns.l), namespace(l=ns.l)] %}{% endfor %}{{ ns.l }}",
    "sums of lists": "{{ ([['a'] * 9999] * 9999) | sum(start=[]) }}",
    "sum of texts": "{{ (['a' * 99999] * 99) | sum(start='') }}",
    "bytes": "{{ 'a'.encode() * 10 ** 11 }}", "an integer's bytes": "{{ (1).to_bytes(10 ** 10, 'big') }}",
    "letters": "{{ ('a' * 99999).translate({97: 'b' * 99999}) }}",
    "strip": "{{ ('a' * 999999).strip('b' * 999999 ~ 'a') }}", "trim": "{{ ('a' * 999999) | trim('b' * 99999 ~ 'a') }}",
    "search from the right": "{{ ('a' * 3999999).rfind('a' * 1000 ~ 'b' ~ 'a' * 9999) }}",
    "wrapped": "{{ ('a ' * 999999) | wordwrap(1, wrapstring='b' * 999) }}",
    "lines": "{{ ('\\n' * 999999) | indent(999) }}",
    "lines of text": "{{ ('\\n' * 99999) | indent('a' * 999) }}", "tabs": "{{ ('\\t' * 999999).expandtabs(999) }}",
    "indented JSON": "{{ [[[range(99999) | list]]] | tojson(indent=999) }}",
    "formats": "{{ ('{:9999}' * 9999).format(*[1] * 9999) }}",
    "one value, often": "{{ ('{0}' * 9999).format('a' * 9999) }}",
    "a width for a filter": "{{ '%999999999d' | format(1) }}",
    "computed by the compiler": "{{ ('a' * 3999999) | wordwrap(1) | wordwrap(1) | length }}{{ 'a' ~ 'b' * 9999999 }}",
    "kept": "{% set ns = namespace(l=[]) %}{% set s = 'a' * 3999999 %}{% for i in range(999) %}"
            "{% set ns.l = [s[i:], 1] %}{% endfor %}",
    "a long source": "x" * 600_000, "half a character": "{{ '\\ud800' }}",
    "half a character by number": "{{ '%c' % 55296 }}",
    "a long time": "{{ strftime_now('%Y' * 9999) }}", "its words": "{{ raise_exception('\\ud800' ~ 'a\\n' * 9999) }}"}


@pytest.mark.parametrize("name", TOO_MUCH)
def test_what_grows_is_refused(name):
    start = time.perf_counter()
    with pytest.raises(RequestError) as caught:
        ChatTemplate(TOO_MUCH[name], {}).render(ASK)
    said = str(caught.value)
    assert "\n" not in said and said.endswith(".") and len(said) < 600 and said.isprintable()
    assert "it takes more than" not in said  # the limit of sizes, not that of time
    assert time.perf_counter() - start < 60  # not a measurement: without a bound these take hours


LONG = {
    "comparisons": "{% set s = 'a' * 3999999 %}{% set t = 'a' * 3999999 %}{% for i in range(99999) %}"
                   "{% if s == t %}{% endif %}{% endfor %}",
    "searches": "{% set s = 'a' * 3999999 %}{% set t = 'a' * 1999999 ~ 'b' %}{% for i in range(99999) %}"
                "{% if t in s %}{% endif %}{% endfor %}",
    "filters": "{% for i in range(99999) %}{% set x = range(99999) | select('odd') | list %}{% endfor %}",
    "calls": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "sums": "{% set a = 7 ** 15000 %}{% for i in range(99999) %}{% set x = a * a %}{% endfor %}"}


@pytest.mark.parametrize("name", LONG)
def test_what_goes_on_is_stopped(name, monkeypatch):
    monkeypatch.setattr(template_limits, "SECONDS", 0.1)
    start = time.perf_counter()
    with pytest.raises(RequestError, match=r"it takes more than 0\.1 s"):
        ChatTemplate(LONG[name], {}).render(ASK)
    assert time.perf_counter() - start < 20


def test_limits_leave_a_long_conversation_alone():
    chat = [{"role": role, "content": f"{i} " + "word " * 200} for i in range(500) for role in ("user", "assistant")]
    source = ("{% set ns = namespace(last=0, all='') %}{% for m in messages %}{% set rest = messages[loop.index0:] %}"
              "{% set ns.last = loop.index %}{% set ns.all = ns.all + m.role %}"
              "{{ '<|' ~ m.role + '|>' + m['content'] | trim }}{% if loop.last %}{{ [m.role, m.content] | tojson }}"
              "{% endif %}{% endfor %}{{ ns.last }}{{ loop_messages is defined }}")
    assert ChatTemplate(source, {}).render(chat).endswith('"]1000False')


def test_loops_know_their_length():
    source = "{% for m in 'abc' %}{{ loop.length }}{{ loop.revindex }}{{ loop.last }}{{ loop.nextitem }} {% endfor %}"
    assert ChatTemplate(source, {}).render(ASK) == "33Falseb 32Falsec 31True "
