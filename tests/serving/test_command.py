"""`dmoe-export serve` before it serves: what it refuses, and that nothing is opened for it."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import pytest
from click.testing import CliRunner
from processes import python_without
from serving import free_port

from dmoe_export.cli import main
from dmoe_export.errors import RequestError
from dmoe_export.serving import process
from dmoe_export.serving.house import House
from dmoe_export.serving.metrics import Metrics
from dmoe_export.serving.process import listen
from dmoe_export.serving.schema import HARMLESS, NOT_HERE, OTHERS, Body

REPOSITORY = Path(__file__).parents[2]


def run(*arguments):
    result = CliRunner().invoke(main, ["serve", *map(str, arguments)])
    return result.exit_code, result.stderr


@pytest.fixture
def keys(tmp_path):
    return tmp_path / "keys"


def test_names_of_bundles(tmp_path):
    assert run(tmp_path / "a.bundle", tmp_path / "b" / "a") == (
        2, "dmoe-export: Two bundles are called a; give each its own --name.\n")
    code, said = run("a", "b", "--name", "x")
    assert code == 2 and "1 --name for 2 bundles; give one for each, or none." in said
    code, said = run("a", "b", "--expect-sha256", "0" * 64)
    assert code == 2 and "--expect-sha256 is of one bundle" in said


@pytest.mark.parametrize("name", ["", "x" * 201, "a\ud800"], ids=["empty", "long", "half a character"])
def test_names_that_no_client_can_send(tmp_path, name):
    code, said = run(tmp_path, "--name", name)
    assert code == 2 and "must have 1 to 200 characters; choose one with --name." in said


def test_a_bundle_without_a_name_of_its_own_is_called_as_its_folder(tmp_path, monkeypatch):
    (tmp_path / "a.bundle" / "inside").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a.bundle")
    assert "Two bundles are called a;" in run(".", "b/a")[1] and "Two bundles are called a;" in run("inside/..", "a")[1]
    assert "must have 1 to 200 characters" in run("/")[1]


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("name", ["--timeout", "--drain-seconds"])
def test_seconds_that_never_end(tmp_path, name, value):
    code, said = run(tmp_path, name, value)
    assert code == 2 and f"{value} is no finite number" in said


def test_of_two_servers_that_begin_together_one_says_that_the_port_is_taken():
    port = free_port()
    first, second = listen("127.0.0.1", port), listen("127.0.0.1", port)
    with first, second:
        first.listen()
        with pytest.raises(RequestError, match=f"Port {port} of 127.0.0.1 cannot be listened on: Address already"):
            process.run(None, House({}, Metrics(), 1, 1.0), second, 0.0, lambda: None)


def test_what_is_no_bundle(tmp_path):
    code, said = run(tmp_path, "--port", 0)
    assert code == 2 and "is no bundle" in said and "serving" not in said


def test_a_port_that_is_taken_is_said_before_anything_is_opened(tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        code, said = run(tmp_path / "none", "--port", port)
    assert code == 2 and f"Port {port} of 127.0.0.1 cannot be listened on: Address already in use" in said
    code, said = run(tmp_path / "none", "--port", free_port(), "--host", "no such host")
    assert code == 2 and "of no such host cannot be listened on" in said


@pytest.mark.parametrize(("content", "words"), [
    (None, "cannot be read: No such file"), (b"\n# none\n \n", "has no key"), ("schlüssel".encode(), "not ASCII"),
    (b"k" * (1 << 21), "more than")])
def test_key_files(tmp_path, keys, content, words):
    if content is not None:
        keys.write_bytes(content)
    code, said = run(tmp_path, "--api-key-file", keys, "--port", 0)
    assert code == 2 and words in said and "k" * 100 not in said


@pytest.mark.parametrize("missing", ["fastapi", "uvicorn", "prometheus_client"])
def test_without_the_extra_it_says_what_to_install(missing):
    done = python_without("from dmoe_export.cli import main; main(['serve', 'b'])", blocked=(missing,))
    assert done.returncode == 3 and f"Serving needs {missing}; run: pip install" in done.stderr


def test_the_page_of_the_server_has_every_field_code_metric_and_default():
    page = (REPOSITORY / "docs" / "serving.md").read_text(encoding="utf-8")
    source = "".join(path.read_text() for path in (REPOSITORY / "dmoe_export" / "serving").glob("*.py"))
    codes = set(re.findall(r'code="(\w+)"', source))
    metrics = set(re.findall(r"^# HELP (\w+) ", Metrics().text().decode(), flags=re.MULTILINE))
    wanted = {*HARMLESS, *NOT_HERE, *OTHERS, *Body.model_fields, *codes, *metrics} - {
        "tool_choice", "parallel_tool_calls", "function_call", "top_logprobs"}
    assert len(codes) > 10 and len(metrics) > 14
    assert sorted(name for name in wanted if not re.search(rf"[`.]{name}[`{{.]", page)) == []
    defaults = dict(re.findall(r"^\| `(--[\w-]+)` \| (\S+) \|", page, flags=re.MULTILINE))
    options = {param.opts[0]: param.default for param in main.get_command(None, "serve").params}
    assert len(defaults) > 4 and {name: float(value) for name, value in defaults.items()} == {
        name: options[name] for name in defaults}
