"""How an export chooses its routing: config.json decides, what was asked for wins, and the difference is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from dmoe_export.bundle.reader import open_bundle
from dmoe_export.checkpoint.family import family_of
from dmoe_export.checkpoint.synthetic import GEOMETRIES, dense_llada
from dmoe_export.cli import main
from dmoe_export.errors import CheckpointError, InputError
from dmoe_export.export.routing import choose_routing

PATH = Path("checkpoint/config.json")
DMOE = GEOMETRIES["tiny"]  # E 16, k 2, 4 groups, 2 kept
PLAIN = {name: value for name, value in DMOE.items() if name not in ("core_threshold", "mode")}
POOLED = PLAIN | {"expert_capacity": 5, "block_size": 16}
SDAR_SILENT = {name: value for name, value in GEOMETRIES["sdar-moe-tiny"].items() if name != "block_size"}
LLADA_MOE = GEOMETRIES["llada-moe-tiny"]
NO_FIELD = "no core_threshold or expert_capacity in config.json"


def chosen(config, routing=None, block_length=None, folder="checkpoint", **settings):
    """`choose_routing` for a config.json, and its warnings."""
    family = family_of(config, PATH)
    source = SimpleNamespace(config=config, folder=Path(folder), family=family,
                             description=family.describe(config, PATH))
    return choose_routing(source, routing, block_length,
                          dict.fromkeys(("top_p", "min_experts", "coreset_size")) | settings)


@pytest.mark.parametrize("asked", [None, "auto"])
@pytest.mark.parametrize(("config", "mode", "values", "reason"), [
    (DMOE, "top_p", {"top_p": 0.6, "min_experts": 4, "block_length": 32}, "core_threshold 0.6 in config.json"),
    (DMOE | {"core_size": 18}, "top_p", {"top_p": 0.6, "min_experts": 4}, "core_threshold 0.6 in config.json"),
    (PLAIN | {"core_threshold": 0.45}, "top_p", {"top_p": 0.45}, "core_threshold 0.45 in config.json"),
    (PLAIN | {"core_threshold": 1, "block_size": 24}, "top_p", {"top_p": 1.0, "block_length": 24},
     "core_threshold 1 in config.json"),
    (PLAIN | {"core_threshold": 0}, "top_p", {"top_p": 0.0}, "core_threshold 0 in config.json"),
    (POOLED, "top_c", {"coreset_size": 5, "block_length": 16}, "expert_capacity 5 and block_size 16 in config.json"),
    (POOLED | {"expert_capacity": 2}, "top_c", {"coreset_size": 2},
     "expert_capacity 2 and block_size 16 in config.json"),
    (POOLED | {"expert_capacity": 16, "block_size": 1}, "top_c", {"coreset_size": 16, "block_length": 1},
     "expert_capacity 16 and block_size 1 in config.json"),
    (PLAIN, "token", {"block_length": 32}, NO_FIELD),
    (PLAIN | {"core_threshold": None, "expert_capacity": None, "block_size": None, "mode": None}, "token",
     {"block_length": 32}, NO_FIELD),
    (PLAIN | {"block_size": 8}, "token", {"block_length": 8}, NO_FIELD),
    (GEOMETRIES["llada2.0-mini"], "token", {"block_length": 32}, NO_FIELD),
    (LLADA_MOE, "token", {"block_length": 32}, NO_FIELD)])
def test_the_checkpoint_decides(config, asked, mode, values, reason):
    route, warnings = chosen(config, asked)
    assert route.mode == mode and {name: getattr(route, name) for name in values} == values
    assert (route.reason, warnings) == (reason, [])


@pytest.mark.parametrize(("config", "routing", "settings"), [
    (DMOE, "top_p", {"top_p": 0.6, "block_length": 32}), (POOLED, "top_c", {"coreset_size": 5, "block_length": 16}),
    (PLAIN, "token", {"block_length": 8}), (LLADA_MOE, "token", {})])
def test_asked_for_as_trained_is_no_warning(config, routing, settings):
    route, warnings = chosen(config, routing, **settings)
    assert warnings == [] and route.mode == routing and route.reason.startswith("asked for, as trained: ")
    assert "; " not in route.reason  # a setting that says the same changes nothing


@pytest.mark.parametrize(("config", "asked", "trained"), [
    (PLAIN, "top_p", "token"), (PLAIN, "top_c", "token"), (LLADA_MOE, "top_p", "token"), (DMOE, "token", "top_p"),
    (DMOE, "top_c", "top_p"), (POOLED, "token", "top_c"), (POOLED, "top_p", "top_c")])
def test_asked_for_against_the_training_is_one_warning(config, asked, trained):
    route, (warning,) = chosen(config, asked)
    assert route.mode == asked and route.reason.startswith(f"asked for; trained with {trained}: ")
    assert warning.startswith(f"Routing {asked} was asked for and the checkpoint was trained with {trained} (")
    assert warning.endswith("expect lower accuracy, or export with --routing auto.")


def test_settings_of_another_training_are_not_taken_over():
    """A checkpoint's C is no p, and top_c of a dMoE checkpoint takes the default C, 48 of 256 but no less than k."""
    assert chosen(POOLED, "top_p")[0].top_p == 0.6
    assert chosen(DMOE, "top_c")[0].coreset_size == 3
    assert chosen(PLAIN | {"num_experts_per_tok": 4}, "top_c")[0].coreset_size == 4


def test_settings_that_differ_from_the_training_are_in_the_reason():
    route, warnings = chosen(DMOE, top_p=0.4, min_experts=6)
    assert (route.top_p, route.min_experts, warnings) == (0.4, 6, [])  # a request may change them, too
    assert route.reason == "core_threshold 0.6 in config.json; top_p 0.4 and min_experts 6 asked for"
    assert chosen(POOLED, coreset_size=8)[0].reason.endswith("; coreset_size 8 asked for")


@pytest.mark.parametrize(("config", "length", "why"), [
    (DMOE, 8, "32 (the only one of dMoE's reference)"), (POOLED, 32, "16 (block_size in config.json)"),
    (PLAIN | {"block_size": 32}, 16, "32 (block_size in config.json)"),
    (DMOE | {"block_size": 16}, 32, "16 (block_size in config.json)")])
def test_another_block_length_is_a_warning(config, length, why):
    route, (warning,) = chosen(config, block_length=length)
    assert route.block_length == length
    assert warning.startswith(f"Block length {length} was asked for and the checkpoint's is {why}: ")


@pytest.mark.parametrize(("folder", "said"), [
    ("SDAR-30B-A3B-Chat-b32", 32), ("somewhere/SDAR-4B-Chat-b8", 8), ("SDAR-8B-Chat", None), ("SDAR-b16-tuned", None),
    ("models--JetLM--SDAR-8B-Chat-b64/snapshots/0123abc", 64), ("SDAR-b0", None)])
def test_block_length_by_name_where_the_config_is_silent(folder, said):
    route, warnings = chosen(SDAR_SILENT, folder=folder)
    assert route.block_length == (said or 4)
    if said:
        name = "SDAR-8B-Chat-b64" if said == 64 else folder.split("/")[-1]
        assert warnings == []
        assert route.reason == f"{NO_FIELD}; block {said}: config.json says none, the name {name} does"
        (warning,) = chosen(SDAR_SILENT, folder=folder, block_length=4)[1]
        assert warning.startswith(f"Block length 4 was asked for and the checkpoint's is {said} (config.json says none")
    else:
        (warning,) = warnings
        assert warning.startswith("Neither config.json (block_size) nor the name ") and "takes 4, as most" in warning
        assert chosen(SDAR_SILENT, folder=folder, block_length=8)[1] == []  # who knows need not be told


def test_block_length_of_the_config_goes_before_the_name():
    config = SDAR_SILENT | {"block_size": 4}
    route, (warning,) = chosen(config, folder="SDAR-4B-Chat-b32")
    assert route.block_length == 4 and route.reason == f"{NO_FIELD}; block 4: block_size in config.json"
    assert warning == ("config.json says block_size 4 and the name SDAR-4B-Chat-b32 says 32; the bundle takes 4, so if "
                       "the name is right, export with --block-length 32.")
    assert chosen(config, folder="SDAR-4B-Chat-b4")[1] == []
    (other,) = chosen(config, folder="SDAR-4B-Chat-b32", block_length=32)[1]
    assert other.startswith("Block length 32 was asked for and the checkpoint's is 4 (block_size in config.json)")


def test_block_length_of_a_dense_model_has_its_reason():
    route, warnings = chosen(GEOMETRIES["sdar-tiny"])
    assert (route.block_length, route.reason, warnings) == (4, "block 4: block_size in config.json", [])


@pytest.mark.parametrize("config", [PLAIN, LLADA_MOE, GEOMETRIES["llada-tiny"]])
def test_names_mean_nothing_in_other_families(config):
    assert chosen(config, folder="model-b8")[0].block_length == 32


@pytest.mark.parametrize("config", [PLAIN, LLADA_MOE, GEOMETRIES["llada-tiny"]])
def test_a_checkpoint_that_says_no_block_length_takes_any(config):
    assert chosen(config, block_length=8)[1] == [] and chosen(config)[0].block_length == 32


@pytest.mark.parametrize(("config", "sentence"), [
    (POOLED | {"core_threshold": 0.6}, "core_threshold 0.6 and expert_capacity 5 are two block routings"),
    (PLAIN | {"expert_capacity": 5}, "block_size is missing; add the block length"),
    (POOLED | {"expert_capacity": 1}, "expert_capacity 1 is outside 2 … 16"),
    (POOLED | {"expert_capacity": 17}, "expert_capacity 17 is outside 2 … 16"),
    (POOLED | {"expert_capacity": 0}, "expert_capacity 0 is outside 2 … 16"),
    (POOLED | {"expert_capacity": True}, "expert_capacity is True, expected int"),
    (POOLED | {"expert_capacity": 4.5}, "expert_capacity is 4.5, expected int"),
    (POOLED | {"block_size": 24}, "block_size 24 is no power of two, which expert_capacity demands"),
    (POOLED | {"block_size": 0}, "block_size is 0, it must be positive"),
    (POOLED | {"block_size": "16"}, "block_size is '16', expected int"),
    (PLAIN | {"block_size": -4}, "block_size is -4, it must be positive"),
    (POOLED | {"block_size": 512}, "Block length 512 is more than the model's 256 positions"),
    (DMOE | {"mode": "average"}, "mode is 'average', which is not supported"),
    (PLAIN | {"mode": "aggregate"}, "core_threshold is missing; add the p"),
    (DMOE | {"core_threshold": 1.01}, "core_threshold 1.01 in checkpoint/config.json is outside 0 … 1"),
    (DMOE | {"core_threshold": float("nan")}, "core_threshold is nan"),
    (DMOE | {"core_threshold": True}, "core_threshold is True, expected float")])
@pytest.mark.parametrize("asked", [None, "token"])
def test_fields_that_do_not_go_together_are_refused(config, sentence, asked):
    """Whatever was asked for: the file has to be corrected first."""
    with pytest.raises(CheckpointError) as raised:
        chosen(config, asked)
    assert sentence in str(raised.value) and str(raised.value).count(". ") == 0


def test_the_pool_of_another_family_is_refused():
    """LLaDA2.2's routing is made of sigmoid scores and a bias; softmax scores under it are nobody's."""
    config = LLADA_MOE | {"expert_capacity": 5, "block_size": 16}
    with pytest.raises(CheckpointError, match="expert_capacity"):
        chosen(config)


@pytest.mark.parametrize(("config", "routing", "setting", "sentence"), [
    (DMOE, "token", {"top_p": 0.5}, "top_p 0.5 has no meaning under routing token .* --coreset-top-p out, or ask for "
                                    "--routing top_p"),
    (PLAIN, None, {"min_experts": 4}, "min_experts 4 has no meaning under routing token .* --min-experts out"),
    (POOLED, None, {"min_experts": 4}, "min_experts 4 has no meaning under routing top_c"),
    (DMOE, None, {"coreset_size": 5}, "coreset_size 5 has no meaning under routing top_p .* for --routing top_c"),
    (DMOE, "top_c", {"top_p": 0.5}, "top_p 0.5 has no meaning under routing top_c")])
def test_a_setting_of_another_mode_is_refused(config, routing, setting, sentence):
    with pytest.raises(InputError, match=sentence):
        chosen(config, routing, **setting)


@pytest.mark.parametrize("size", [1, 17])
def test_a_pool_no_token_can_use_is_refused(size):
    with pytest.raises(CheckpointError, match=f"coreset_size {size} is outside 2 … 16"):
        chosen(POOLED, coreset_size=size)


def test_dense_models_route_nothing():
    route, warnings = chosen(dense_llada(layers=1, hidden=64))
    assert (route.mode, route.block_length, warnings) == ("token", 32, [])
    assert chosen(dense_llada(layers=1, hidden=64), "token", 8)[0].block_length == 8


@pytest.fixture(scope="module")
def plain_export(tiny_checkpoint, tmp_path_factory):
    """`tiny` as a token-trained checkpoint that was asked for top_p, on the command line: folder, what was printed."""
    folder = tmp_path_factory.mktemp("plain")
    shutil.copytree(tiny_checkpoint, folder / "c")
    (folder / "c" / "config.json").write_text(json.dumps(PLAIN))
    done = CliRunner().invoke(main, ["export", str(folder / "c"), "--out", str(folder / "b"), "--routing", "top_p"])
    assert done.exit_code == 0, done.output
    return folder / "b", done


def test_the_warning_is_printed_and_stays_in_the_bundle(plain_export):
    folder, done = plain_export
    warnings = open_bundle(folder).manifest.warnings
    sentence = f"Routing top_p was asked for and the checkpoint was trained with token ({NO_FIELD}): "
    assert len([w for w in warnings if w.startswith(sentence)]) == 1
    assert done.stderr.count(f"dmoe-export: warning: {sentence}") == 1


def test_why_is_printed_and_shown_by_inspect(plain_export):
    folder, done = plain_export
    assert f"routing top_p (asked for; trained with token: {NO_FIELD}), block 32" in done.stdout
    shown = " ".join(CliRunner().invoke(main, ["inspect", str(folder)]).stdout.split())
    assert "because" in shown and "trained with token" in shown
    assert "min_experts" in shown and "coreset_size" not in shown  # settings of its mode alone
