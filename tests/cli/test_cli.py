"""The command as a user meets it: output, JSON, exit codes, one sentence per error."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from dmoe_export.bundle.engine_entries import EngineEntry
from dmoe_export.bundle.engines import add_engine
from dmoe_export.cli import main


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def bundle(tiny_bundle):
    return tiny_bundle.folder


def test_export_generate_inspect(tiny_checkpoint, tmp_path):
    out = tmp_path / "b"
    result = run("export", tiny_checkpoint, "--out", out, "--block-length", 8, "--routing", "top_c", "--json")
    assert result.exit_code == 0, result.output
    exported = json.loads(result.stdout)
    assert exported["manifest"]["routing"] == {
        "mode": "top_c", "block_length": 8, "top_p": 0.6, "min_experts": 4, "coreset_size": 3,
        "reason": "asked for; trained with top_p: core_threshold 0.6 in config.json"}
    said = [line.removeprefix("dmoe-export: warning: ") for line in result.stderr.splitlines()]
    assert said == exported["manifest"]["warnings"]
    assert {"Routing top_c", "Block length 8"} <= {words.split(" was ")[0] for words in said}
    inspected = json.loads(run("inspect", out, "--json").stdout)
    assert inspected["manifest"] == exported["manifest"]
    assert inspected["sizes"]["bytes_per_expert"] == 3 * 32 * 32 * 4
    shown = run("inspect", out).stdout
    for word in ("LLaDA2MoeModelLM", "top_c", "asked for; trained", "DmoeMixture", "experts.bin", "tokenizer"):
        assert word in shown
    result = run("generate", out, "--prompt-ids", "1,2,3", "--max-new-tokens", 12, "--eos-id", -1, "--json",
                 "--coreset-size", 6, "--block-length", 8)
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert set(answer) == {"token_ids", "text", "finish_reason", "stats", "backend", "decode_defaults"}
    assert not answer["decode_defaults"]
    assert answer["backend"]["name"] == "onnxruntime" and "no engine" in answer["backend"]["why"]
    assert len(answer["token_ids"]) == 12 and answer["text"] is None and answer["finish_reason"] == "length"
    stats = answer["stats"]
    assert stats["forwards"] == sum(stats["forwards_by_phase"].values())
    assert stats["tokens_per_forward"] == 12 / stats["forwards"]
    assert 0 < stats["unique_experts"] <= 6


def test_stream_gives_the_same_tokens(bundle):
    options = ("generate", bundle, "--prompt-ids", "1,2,3", "--max-new-tokens", 70, "--eos-id", -1, "--json",
               "--threshold", "0.1")
    whole = json.loads(run(*options).stdout)
    lines = [json.loads(line) for line in run(*options, "--stream").stdout.splitlines()]
    assert len(lines) == 4  # three blocks and the result
    blocks = [i for line in lines[:-1] for i in line["block"]]
    assert blocks == lines[-1]["token_ids"] == whole["token_ids"]


def test_probabilities_are_in_json_alone(bundle):
    options = ("generate", bundle, "--prompt-ids", "1,2,3", "--max-new-tokens", 20, "--eos-id", -1, "--logprobs", 2)
    whole = json.loads(run(*options, "--json").stdout)
    lines = [json.loads(line) for line in run(*options, "--json", "--stream").stdout.splitlines()]
    assert [one["token_id"] for one in whole["probabilities"]] == whole["token_ids"]
    assert [one for line in lines[:-1] for one in line["probabilities"]] == whole["probabilities"]
    assert all(len(one["top"]) == 2 and one["token"] is None for one in whole["probabilities"])
    refused = run(*options)
    assert refused.exit_code == 2 and "--logprobs is shown by --json alone; give it, too." in refused.output
    assert "probabilities" not in json.loads(run(*options[:-2], "--json").stdout)


def test_sampling_is_seeded(bundle):
    def tokens(seed):
        return json.loads(run("generate", bundle, "--prompt-ids", "5", "--max-new-tokens", 20, "--temperature", 1,
                              "--seed", seed, "--eos-id", -1, "--json").stdout)["token_ids"]

    assert tokens(1) == tokens(1) != tokens(2)
    assert 95 not in tokens(1)


BAD = [
    (("--prompt-ids", "1,2,96"), "token id 96, outside the vocabulary 0 … 95"),
    (("--prompt-ids", "-1"), "token id -1"),
    (("--prompt-ids", ""), "is empty"),
    (("--prompt-ids", "a,b"), "no list of integers"),
    (("--prompt", ""), "is empty"),
    (("--prompt", "  \n"), "is empty"),
    (("--prompt", "hello"), "has no tokenizer"),
    (("--prompt-file", "/nowhere"), "Prompt file /nowhere cannot be read"),
    ((), "exactly one of"),
    (("--prompt", "a", "--prompt-ids", "1"), "exactly one of"),
    (("--prompt-ids", ",".join(["1"] * 250)), "need 378 positions, the model has 256"),
    (("--prompt-ids", "1", "--block-length", "16"), "block_length 16 differs from the bundle's 32"),
    (("--prompt-ids", "1", "--coreset-size", "4"), "coreset_size has no meaning"),
    (("--prompt-ids", "1", "--coreset-top-p", "1.5"), "coreset_top_p is 1.5"),
    (("--prompt-ids", "1", "--min-experts", "0"), "min_experts is 0"),
    (("--prompt-ids", "1", "--eos-id", "96"), "eos_id 96"),
    (("--prompt-ids", "1", "--threshold", "2"), "threshold is 2"),
    (("--prompt-ids", "1", "--max-new-tokens", "0"), "max_new_tokens is 0"),
    (("--prompt-ids", "1", "--acceptance", "guess"), "guess"),
]


@pytest.mark.parametrize(("options", "sentence"), BAD, ids=[" ".join(o)[:40] for o, _ in BAD])
def test_bad_requests(bundle, options, sentence):
    result = run("generate", bundle, *options)
    assert result.exit_code == 2
    assert sentence in result.stderr and "Traceback" not in result.output
    assert result.stdout == ""


def test_no_bundle_and_no_checkpoint(tmp_path):
    for arguments in (("generate", tmp_path, "--prompt-ids", "1"), ("inspect", tmp_path)):
        result = run(*arguments)
        assert result.exit_code == 2 and "is no bundle" in result.stderr and result.stderr.count("\n") == 1
    result = run("export", tmp_path, "--out", tmp_path / "b")
    assert result.exit_code == 2 and "config.json is missing" in result.stderr
    assert not list(tmp_path.iterdir())


def test_bf16_needs_another_backend(tiny_checkpoint, tmp_path):
    made = run("export", tiny_checkpoint, "--out", tmp_path / "b", "--precision", "bf16", "--compute", "bf16")
    assert made.exit_code == 0
    result = run("generate", tmp_path / "b", "--prompt-ids", "1")
    assert result.exit_code == 3 and "export with --compute fp32" in result.stderr


STOPPED = """
import os, signal, sys, time, dmoe_export
signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever nohup, or a shell's &, made of them
for number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)
from dmoe_export.bundle.writer import BundleWriter
from dmoe_export.cli import main

def export_checkpoint(checkpoint, out, **_):
    with BundleWriter(out) as writer:
        writer.data_file("experts.bin").write(b"half of it")
        os.kill(os.getpid(), int(sys.argv[2]))
        time.sleep(30)

dmoe_export.export_checkpoint = export_checkpoint
main(["export", "checkpoint", "--out", sys.argv[1]])
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_stopped_export_leaves_nothing(tmp_path, number, code):
    done = subprocess.run([sys.executable, "-c", STOPPED, str(tmp_path / "new" / "b"), str(int(number))],
                          capture_output=True, text=True, timeout=100)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


def _piped(reader, *arguments):
    """Exit codes of the command and of who reads it, and the command's standard error."""
    command = subprocess.Popen([sys.executable, "-m", "dmoe_export", *map(str, arguments)], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    subprocess.run(reader, stdin=command.stdout, stdout=subprocess.DEVNULL, check=True)
    command.stdout.close()
    said = command.stderr.read()
    return command.wait(), said


@pytest.mark.parametrize("arguments", [("inspect", "BUNDLE"), ("inspect", "BUNDLE", "--json"),
                                       ("generate", "BUNDLE", "--prompt-ids", "1", "--json")])
def test_a_reader_that_leaves_is_no_error(bundle, arguments):
    assert _piped(["true"], *(bundle if word == "BUNDLE" else word for word in arguments))[0] == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no full disk to write to")
def test_output_to_a_full_disk(bundle):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, "-m", "dmoe_export", "inspect", str(bundle), "--json"], stdout=full,
                              stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and done.stderr == "dmoe-export: Output: No space left on device.\n"


def test_tables_in_a_file_hold_whole_names(half_bundle_with_an_engine):
    shown = run("inspect", half_bundle_with_an_engine).stdout
    for word in ("denoiser.tensorrt-rtx.sm80-sm89.engine", "1.7.1.116", "123,456,789,012"):
        assert word in shown


@pytest.fixture
def half_bundle_with_an_engine(bundle, tmp_path):
    """The manifest's entry of one; the file is of no interest here."""
    folder = tmp_path / "b"
    shutil.copytree(bundle, folder)
    sizes = {"batch": (1, 1, 1), "tokens": (32, 64, 128), "past": (1, 256, 512), "rows": (1, 32, 32)}
    weight = {"name": "w", "file": "experts.bin", "offset": 0, "bytes": 123456789012, "dtype": "float16", "shape": [1]}
    entry = EngineEntry.model_validate({
        "file": "denoiser.tensorrt-rtx.sm80-sm89.engine", "flavour": "tensorrt-rtx", "version": "1.7.1.116",
        "targets": ["sm80", "sm89"], "precision": "fp16", "experts": "external", "experts_op": "plugin",
        "profiles": [{"name": "prefill", **sizes}, {"name": "denoise", **sizes}], "plugin_build": None,
        "plugin_nodes": 2, "fallback_nodes": 0, "weight_inputs": [weight], "expert_pools": [], "flags": [],
        "made_from": {"denoiser.onnx": "0"}, "network": {"inputs": [], "outputs": [], "profiles": [], "layers": {}}})
    (folder / "engine").write_bytes(b"x")
    add_engine(folder, folder / "engine", entry)
    return folder


def test_unexpected_errors_are_one_sentence_too(bundle, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("boom")

    monkeypatch.setattr("dmoe_export.opening.open_bundle", broken)
    result = run("generate", bundle, "--prompt-ids", "1")
    assert result.exit_code == 1 and "unexpected RuntimeError: boom" in result.stderr
    assert "Traceback" not in result.output
    assert "Traceback" in run("--debug", "generate", bundle, "--prompt-ids", "1").stderr
    assert "Traceback" in run("generate", bundle, "--prompt-ids", "1", "--debug").stderr


def test_names_of_others_steer_no_terminal_and_are_no_markup(bundle, tmp_path):
    """A file's name in an error, a manifest's words in a table."""
    result = run("inspect", tmp_path / "a\n\x1b[31mb")
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and r"a\n\x1b[31mb is no bundle" in result.stderr
    folder = shutil.copytree(bundle, tmp_path / "b")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["checkpoint"]["source"] = "[/red]\x1b[2J"
    manifest["warnings"] = ["[/b] \x1b[2J"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    shown = run("inspect", folder)
    assert shown.exit_code == 0 and r"[/red]\x1b[2J" in shown.stdout and r"[/b] \x1b[2J" in shown.stdout
    assert "\x1b" not in shown.stdout
