"""The command as a user meets it: output, JSON, exit codes, one sentence per error."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

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
    assert exported["manifest"]["routing"] == {"mode": "top_c", "block_length": 8, "top_p": 0.6, "min_experts": 4,
                                               "coreset_size": 4}
    inspected = json.loads(run("inspect", out, "--json").stdout)
    assert inspected["manifest"] == exported["manifest"]
    assert inspected["sizes"]["bytes_per_expert"] == 3 * 32 * 32 * 4
    shown = run("inspect", out).stdout
    for word in ("LLaDA2MoeModelLM", "top_c", "DmoeExperts", "experts.bin", "tokenizer"):
        assert word in shown
    result = run("generate", out, "--prompt-ids", "1,2,3", "--max-new-tokens", 12, "--eos-id", -1, "--json",
                 "--coreset-size", 6, "--block-length", 8)
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert set(answer) == {"token_ids", "text", "finish_reason", "stats", "backend"}
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
    assert run("export", tiny_checkpoint, "--out", tmp_path / "b", "--precision", "bf16").exit_code == 0
    result = run("generate", tmp_path / "b", "--prompt-ids", "1")
    assert result.exit_code == 3 and "export with --precision fp32 or fp16" in result.stderr


def test_unexpected_errors_are_one_sentence_too(bundle, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("boom")

    monkeypatch.setattr("dmoe_export.generator.open_bundle", broken)
    result = run("generate", bundle, "--prompt-ids", "1")
    assert result.exit_code == 1 and "unexpected RuntimeError: boom" in result.stderr
    assert "Traceback" not in result.output
    assert "Traceback" in run("--debug", "generate", bundle, "--prompt-ids", "1").stderr
    assert "Traceback" in run("generate", bundle, "--prompt-ids", "1", "--debug").stderr
