"""`chat_template_kwargs` from Python, the command line and over HTTP: one prompt, or a refusal."""

from __future__ import annotations

import asyncio
import json

import pytest
from bundles import with_template
from click.testing import CliRunner
from page_helpers import CHAT, ask, house_of, served

from dmoe_export import Generator
from dmoe_export.cli import main
from dmoe_export.errors import RequestError

TEMPLATE = ("{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}"
            "{% for m in messages %}<role>HUMAN</role>{{ m.content }}<|role_end|>{% endfor %}<role>ASSISTANT</role>"
            "{% if enable_thinking is defined and not enable_thinking %}2 + 3 = {% endif %}")
QUESTION = "what is 2 plus 3?"
USER = [{"role": "user", "content": QUESTION}]
OFF = {"enable_thinking": False}
SHORT = {"max_new_tokens": 32}


@pytest.fixture(scope="module")
def bundle(sample_bundle, tmp_path_factory):
    return with_template(sample_bundle, tmp_path_factory.mktemp("template") / "b", TEMPLATE)


@pytest.fixture(scope="module")
def house(bundle):
    with house_of(bundle) as house:
        yield house


@pytest.fixture(scope="module")
def generator(house):
    return house.models["sample"].generator


@pytest.fixture(scope="module")
def url(house):
    with served(house) as url:
        yield url


@pytest.fixture(scope="module")
def prompts(generator):
    """Ids with the template's own thinking, and with it off."""
    plain, off = generator.text.encode_chat(USER), generator.text.encode_chat(USER, OFF)
    assert off[:len(plain)] == plain and len(off) > len(plain)
    return plain, off


def test_every_way_to_ask_encodes_with_it(generator, prompts):
    async def blocks():
        return [b async for b in generator.astream(QUESTION, chat_template_kwargs=OFF, **SHORT)]

    for kwargs, prompt in ((OFF, prompts[1]), ({"enable_thinking": True}, prompts[0]), ({}, prompts[0])):
        assert list(generator.request(USER, chat_template_kwargs=kwargs).token_ids) == prompt
    (want,), (other,) = generator.generate(prompts[1], **SHORT), generator.generate(prompts[0], **SHORT)
    assert want.token_ids != other.token_ids
    answers = generator.generate([QUESTION, USER], chat_template_kwargs=OFF, **SHORT)
    assert [one.token_ids for one in answers] == [want.token_ids] * 2
    for got in (list(generator.stream(QUESTION, chat_template_kwargs=OFF, **SHORT)), asyncio.run(blocks())):
        assert [i for block in got for i in block.token_ids] == want.token_ids


@pytest.mark.parametrize(("prompt", "more", "sentence"), [
    ([5, 6], {}, "chat_template_kwargs is {'enable_thinking': False}, but token ids go through no chat template"),
    ([QUESTION, [5, 6]], {}, "but token ids go through no chat template; leave it out"),
    (QUESTION, {"chat": False}, r"but with chat=False \(--no-chat\) a prompt goes through no chat template; leave it"),
    (USER, {"chat": False}, "through no chat template"), ("", {"chat": False}, "through no chat template"),
    (QUESTION, {"chat_template_kwargs": [1]}, r"chat_template_kwargs is \[1\], it must have values by their names"),
    (QUESTION, {"chat_template_kwargs": "enable_thinking"}, "it must have values by their names"),
    (QUESTION, {"chat_template_kwargs": {"brief": True}}, r"does not read \(it reads enable_thinking\)")])
def test_refused_before_anything_runs(generator, prompt, more, sentence):
    with pytest.raises(RequestError, match=sentence):
        generator.stream(prompt, **{"chat_template_kwargs": OFF} | more)


def test_a_template_that_reads_nothing_by_name_says_so(sample_bundle):
    with Generator.open(sample_bundle.folder, verify="sizes") as generator, pytest.raises(
            RequestError, match=r"does not read \(it reads none\); leave it out.$"):
        generator.stream(QUESTION, chat_template_kwargs=OFF)


def test_the_server_encodes_with_it(url, prompts):
    body = {"model": "sample", "messages": USER, "max_tokens": 32}
    for kwargs, prompt in ((OFF, prompts[1]), ({"enable_thinking": True}, prompts[0]), (None, prompts[0])):
        answer = ask(f"{url}/v1/chat/completions", body | {"chat_template_kwargs": kwargs}).json()
        assert answer["usage"]["prompt_tokens"] == len(prompt)
    done = ask(url + CHAT, body | {"chat_template_kwargs": OFF}).events()[-1]
    assert done[0] == "done" and done[1]["usage"]["prompt_tokens"] == len(prompts[1])
    plain = ask(f"{url}/v1/completions", {"model": "sample", "prompt": QUESTION, "chat_template_kwargs": OFF})
    assert plain.status == 400 and plain.json()["error"]["message"] == (
        "chat_template_kwargs is not offered here; leave it out.")


def test_the_server_tells_the_template_of_tools(url, prompts):
    body = {"model": "sample", "messages": USER, "max_tokens": 4}
    tools = {"tools": [{"type": "function", "function": {"name": "plus plus"}}]}
    usage = [ask(f"{url}/v1/chat/completions", body | more).json()["usage"]["prompt_tokens"] for more in (
        tools, tools | {"tool_choice": "auto", "chat_template_kwargs": OFF}, tools | {"tool_choice": "none"}, {})]
    plain, off = map(len, prompts)
    assert usage == [plain + 2, off + 2, plain, plain]
    refused = ask(f"{url}/v1/chat/completions", body | {"chat_template_kwargs": tools})
    assert refused.status == 400 and "tools is a field of its own" in refused.text


@pytest.mark.parametrize(("kwargs", "words"), [
    ({"enable_thinking": "no"}, "sets 'enable_thinking' to 'no', it must be true, false, null or a number"),
    ({"brief": True}, "does not read (it reads enable_thinking); leave it out."),
    ({"messages": None}, "which is not for a request to set"), ({"\ud800": 1}, "no name of a variable"),
    ({f"a{i}": 1 for i in range(1000)}, "has 1000 names, more than 16"), ({"a" * 9000: 1}, "does not read"),
    ({"enable_thinking": 10**4000}, "it must be true"), ([], "valid dictionary"), ("x", "valid dictionary")])
def test_the_server_refuses_the_rest_by_the_field_s_name(url, kwargs, words):
    answer = ask(f"{url}/v1/chat/completions", {"model": "sample", "messages": USER, "chat_template_kwargs": kwargs})
    error = answer.json()["error"]
    assert answer.status == 400 and error["param"] == "chat_template_kwargs" and words in error["message"]
    assert len(answer.text) < 800


def run(bundle, *arguments):
    return CliRunner().invoke(main, ["generate", str(bundle.folder), "--max-new-tokens", "32", *arguments])


def test_the_command_line_has_it(bundle, generator, prompts):
    (want,) = generator.generate(prompts[1], **SHORT)
    for more in (["--json"], ["--watch", "--json"], ["--stream", "--json"]):
        done = run(bundle, "--prompt", QUESTION, "--template-kwarg", "enable_thinking=false", *more)
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout.splitlines()[-1])["token_ids"] == want.token_ids


@pytest.mark.parametrize(("given", "sentence"), [
    (["enable_thinking"], "--template-kwarg 'enable_thinking' is no NAME=VALUE with true, false, null or a number"),
    (["enable_thinking=False"], "is no NAME=VALUE"), (["enable_thinking=nan"], "is no NAME=VALUE"),
    (["enable_thinking=1e999"], "to inf, it must be true"), (["=true"], "sets '' to True, and that is no name"),
    (["enable_thinking=true", "--template-kwarg", "enable_thinking=1"], "enable_thinking is given twice; give it"),
    (["brief=0.5"], "sets 'brief' to 0.5, which the chat template does not read"),
    (["enable_thinking=null", "--no-chat"], "{'enable_thinking': None}, but with chat=False (--no-chat)")])
def test_and_refuses_what_is_no_switch(bundle, given, sentence):
    done = run(bundle, "--prompt", QUESTION, "--template-kwarg", *given)
    assert done.exit_code == 2 and sentence in done.stderr and done.stdout == ""
