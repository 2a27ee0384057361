"""What `dmoe-export deploy triton` writes, and what it refuses to overwrite."""

from __future__ import annotations

import json
import re

import pytest
from click.testing import CliRunner

from dmoe_export.cli import main
from dmoe_export.deploy.triton import model_config
from dmoe_export.serving.triton_settings import PARAMETERS


def deploy(*words):
    return CliRunner().invoke(main, ["deploy", "triton", *map(str, words)], prog_name="dmoe-export")


def parsed(text):
    """Protobuf's text format as dictionaries of lists: `key: value`, `key { … }` and `key [ {…}, … ]`."""
    tokens = re.findall(r'"(?:[^"\\]|\\\d{3})*"|[\w.-]+|[{}\[\]:,]', re.sub(r"^#.*$", "", text, flags=re.MULTILINE))

    def value():
        token = tokens.pop(0)
        if token == "{":
            return fields("}")
        if token == "[":
            found = []
            while tokens[0] != "]":
                found.append(value())
                if tokens[0] == ",":
                    tokens.pop(0)
            tokens.pop(0)
            return found
        if token.startswith('"'):
            octal = re.sub(rb"\\(\d{3})", lambda one: bytes([int(one[1], 8)]), token[1:-1].encode())
            return octal.decode("utf-8", "surrogateescape")
        return token

    def fields(end):
        found = {}
        while tokens and tokens[0] != end:
            name = tokens.pop(0)
            if tokens[0] == ":":
                tokens.pop(0)
            one = value()
            found.setdefault(name, []).extend(one if isinstance(one, list) and name != "dims" else [one])
        if tokens:
            tokens.pop(0)
        return found

    return fields(None)


def parameters(config):
    return {one["key"][0]: one["value"][0]["string_value"][0] for one in config["parameters"]}


def test_the_configuration_of_a_model(tiny_bundle, tmp_path):
    result = deploy(tiny_bundle.folder, "--out", tmp_path / "r", "--name", "tiny", "--threads", 2, "--expert-budget",
                    "50%", "--prefix-cache", "1M", "--instances", 2, "--max-waiting", 64, "--kind", "gpu", "--json")
    assert result.exit_code == 0, result.stderr
    config = parsed((tmp_path / "r" / "tiny" / "config.pbtxt").read_text())
    given = {"bundle": str(tiny_bundle.folder.resolve()), "threads": "2", "expert_budget": "50%",
             "prefix_cache": "1M", "max_waiting": "64"}
    assert parameters(config) == given and given.keys() <= set(PARAMETERS)
    assert json.loads(result.stdout) == {"model": "tiny", "folder": str(tmp_path / "r" / "tiny"), "parameters": given}
    assert config["name"] == ["tiny"] and config["backend"] == ["python"] and config["max_batch_size"] == ["0"]
    head = (tmp_path / "r" / "tiny" / "config.pbtxt").read_text().splitlines()[1]
    assert head.startswith("# dmoe-export deploy triton ") and " --expert-budget 50% " in head
    assert config["model_transaction_policy"] == [{"decoupled": ["true"]}]
    assert config["instance_group"] == [{"kind": ["KIND_GPU"], "count": ["2"]}]
    assert {one["name"][0]: one["data_type"][0] for one in config["input"]}["input_ids"] == "TYPE_INT64"
    assert all(one["optional"] == ["true"] and one["dims"] in ([["1"]], [["-1"]]) for one in config["input"])
    assert [one["name"][0] for one in config["output"]] == ["text_output", "output_ids", "finish_reason",
                                                            "num_input_tokens", "num_output_tokens"]


def test_every_option_of_the_verb_is_a_parameter_the_model_knows():
    verb = main.get_command(None, "deploy").get_command(None, "triton")
    ours = {"bundle_path", "out", "force", "as_json", "name", "kind", "instances"}
    assert {one.name for one in verb.params} - ours == set(PARAMETERS)


@pytest.mark.parametrize("path", ['/a "b"\\c', "/bündel/模", "/a\nb", "/\udcff"])
def test_any_path_survives_the_text_format(path):
    text = model_config("m", {"bundle": path}, command=f"deploy {path}\nname: 'other'")
    assert text.count("\n") == model_config("m", {"bundle": ""}, command="x").count("\n")
    assert parameters(parsed(text)) == {"bundle": path}


def test_nothing_is_overwritten_but_what_it_wrote(tiny_bundle, tmp_path):
    words = (tiny_bundle.folder, "--out", tmp_path, "--name", "tiny")
    said = f"Wrote model tiny: {tmp_path / 'tiny'}; start it with: tritonserver --model-repository {tmp_path}\n"
    assert deploy(*words).stdout == said
    config, model = tmp_path / "tiny" / "config.pbtxt", tmp_path / "tiny" / "1" / "model.py"
    other = tmp_path / "tiny" / "2" / "model.py"
    other.parent.mkdir()
    other.write_text("mine")
    before = config.read_text()
    again = deploy(*words, "--threads", 1)
    assert again.exit_code == 2 and config.read_text() == before
    assert again.stderr == (f"dmoe-export: {tmp_path / 'tiny'} exists already; choose another --out or --name, or add "
                            "--force.\n")
    model.write_text("old")
    assert deploy(*words, "--threads", 1, "--force").exit_code == 0
    assert "threads" in config.read_text() and "TritonPythonModel" in model.read_text() and other.read_text() == "mine"
    assert sorted(one.name for one in tmp_path.rglob("*") if one.is_file()) == ["config.pbtxt", "model.py", "model.py"]
    for theirs in ('name: "tiny"\n', None):
        config.unlink() if theirs is None else config.write_text(theirs)
        refused = deploy(*words, "--force")
        assert refused.exit_code == 2 and "was not written by dmoe-export deploy triton, so it stays" in refused.stderr
        assert theirs is None or config.read_text() == theirs


@pytest.mark.parametrize(("words", "sentence"), [
    (["--name", "a/b"], "Model name 'a/b' must have 1 to 200 letters, digits, dots, dashes and underscores"),
    (["--name", ".a"], "Model name '.a' must have"),
    (["--backend", "tensorrt"], "Backend tensorrt runs on GPUs; add --kind gpu."),
    (["--backend", "onnxruntime", "--kind", "gpu"], "Backend onnxruntime runs on the CPU; leave --kind gpu out"),
    (["--expert-budget", "much"], "much"),
    (["--out", "/proc/nothing"], "/proc/nothing"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_what_cannot_be_deployed_is_refused(tiny_bundle, tmp_path, words, sentence):
    result = deploy(tiny_bundle.folder, "--out", tmp_path / "r", *words)
    assert result.exit_code == 2 and sentence in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "r").exists()


def test_a_missing_bundle_and_one_elsewhere(tiny_bundle, tmp_path):
    gone = deploy(tmp_path / "gone.bundle", "--out", tmp_path / "r")
    assert gone.exit_code == 2 and "gone.bundle is no bundle: it does not exist" in gone.stderr
    linked = tmp_path / "linked.bundle"
    linked.symlink_to(tiny_bundle.folder)
    assert deploy(linked, "--out", tmp_path / "r", "--bundle-path", "/bundles/tiny").exit_code == 0
    (config,) = (tmp_path / "r").glob("*/config.pbtxt")
    assert config.parent.name == "linked"
    assert parameters(parsed(config.read_text())) == {"bundle": "/bundles/tiny"}
