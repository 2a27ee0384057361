"""`generate` with caches, acceptance rules and editing, on a block-causal and on a full-canvas bundle."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from dmoe_export import Generator
from dmoe_export.cli import main
from dmoe_export.errors import RequestError


@pytest.fixture(scope="module")
def full(synthetic, exported):
    return exported(synthetic("llada-tiny"), block_length=8).folder


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def answer(bundle, *options):
    fixed = ("--prompt-ids", "1,2,3", "--eos-id", -1, "--max-new-tokens", 20, "--json")
    result = run("generate", bundle, *fixed, *options)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_caches_of_a_full_canvas_model(full):
    phases = {cache: answer(full, "--cache", cache, "--acceptance", "fixed", "--steps", 4)["stats"]["forwards_by_phase"]
              for cache in ("auto", "none", "prefix", "dual")}
    assert phases["none"] == {"prefill": 0, "full": 12, "denoise": 0, "commit": 0}
    assert phases["auto"] == phases["prefix"] == phases["dual"] == {"prefill": 0, "full": 3, "denoise": 9, "commit": 0}
    assert answer(full, "--block-length", 20, "--steps", 2, "--acceptance", "fixed")["stats"]["forwards"] == 2


def test_acceptance_and_editing_compose(full, tiny_bundle):
    for bundle in (full, tiny_bundle.folder):
        for options in (("--acceptance", "hierarchy", "--low-threshold", "0.01"),
                        ("--acceptance", "credit", "--credit-alpha", 2, "--credit-beta", 0.9, "--credit-gamma", 0.1),
                        ("--edit-threshold", "0.0", "--edit-passes", 2, "--threshold", "0.01", "--temperature", 1)):
            result = answer(bundle, *options)
            assert len(result["token_ids"]) == 20 and result["finish_reason"] == "length"
        assert result["stats"]["edits"] > 0


def test_an_end_may_be_given_again_and_what_is_not_given_is_the_default(full):
    free = answer(full)["token_ids"]  # with --eos-id -1
    ends = [free[15], free[7]]
    given = ("--prompt-ids", "1,2,3", "--max-new-tokens", 20, "--json", "--eos-id", ends[0], "--eos-id", ends[1])
    result = json.loads(run("generate", full, *given).stdout)
    assert result["finish_reason"] == "eos" and result["token_ids"] == free[:min(map(free.index, ends))]
    model = Generator.open(full, threads=1).generate([[1, 2, 3]], max_new_tokens=20)[0]
    said = json.loads(run("generate", full, *given[:5]).stdout)
    assert said["token_ids"] == model.token_ids and said["finish_reason"] == model.finish_reason
    for options in (("--early-stop", "--steps", 2**31), ("--steps", 8)):
        assert answer(full, *options)["token_ids"] == free


def test_streams_and_batches_of_a_full_canvas_model(full):
    generator = Generator.open(full, threads=1)
    prompts, options = [[1, 2, 3], [4] * 9], {"max_new_tokens": 20, "eos_id": -1, "threshold": 0.02, "temperature": 0.7}
    together = generator.generate(prompts, **options)
    blocks = list(generator.stream(prompts, **options))
    for i in range(2):
        mine = [block for block in blocks if block.index == i]
        assert [len(block.token_ids) for block in mine] == [8, 8, 4]
        assert [token for block in mine for token in block.token_ids] == together[i].token_ids
    assert generator.generate([prompts[1]], **{**options, "seed": 1})[0].token_ids == together[1].token_ids


BAD = [
    ("full", ("--cache", "block"), "Cache block is exact only where blocks see no later ones"),
    ("full", ("--block-length", "0"), "block_length is 0"),
    ("full", ("--coreset-size", "4"), "its model is dense"),
    ("full", ("--eos-id", "3", "--eos-id", "96"), "eos_id 96 is outside the vocabulary"),
    ("full", ("--eos-id", "3", "--eos-id", "-1"), "eos_id is (3, -1), it must be a token id, several of them, or -1"),
    ("block", ("--cache", "prefix"), "its block cache exact: use block or none"),
    ("block", ("--cache", "dual"), "its block cache exact: use block or none"),
    ("block", ("--cache", "big"), "big"),
    ("block", ("--low-threshold", "2"), "low_threshold is 2"),
    ("block", ("--credit-beta", "2"), "credit_beta is 2"),
    ("block", ("--edit-threshold", "-1"), "edit_threshold is -1"),
]


@pytest.mark.parametrize(("model", "options", "sentence"), BAD, ids=[" ".join(o) for _, o, _ in BAD])
def test_bad_requests(full, tiny_bundle, model, options, sentence):
    bundle = full if model == "full" else tiny_bundle.folder
    result = run("generate", bundle, "--prompt-ids", "1", *options)
    assert result.exit_code == 2 and sentence in result.stderr and result.stdout == ""
    assert "Traceback" not in result.output


def test_unknown_options_are_one_sentence(full):
    with pytest.raises(RequestError, match="Unknown generation option"):
        Generator.open(full, threads=1).generate([[1]], speed=2)
