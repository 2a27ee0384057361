"""Recipes: every shipped one is valid, bad ones are one sentence, and the sample's builds from its name alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import SAMPLE
from engine_helpers import RTX_TARGETS, built, dmoe, plugin_library

from dmoe_export import export_checkpoint, recipe
from dmoe_export.bundle.reader import open_bundle
from dmoe_export.cli import main
from dmoe_export.cli.recipes import check_bundle, with_recipe
from dmoe_export.errors import InputError
from dmoe_export.hub import _HUB_ID
from dmoe_export.recipe import FOLDER, load_recipe, recipe_names

REPOSITORY = Path(__file__).parents[2]
KNOWN = ["diffusion-gemma-26b-a4b", "dmoe-16b", "llada-moe-7b", "llada2.0-flash", "llada2.0-mini", "llada2.1-flash",
         "llada2.1-mini", "llada2.2-flash", "sample", "sdar-1.7b", "sdar-30b-a3b", "sdar-4b", "sdar-8b"]


def test_the_known_models_have_recipes_and_they_lie_in_engines():
    assert recipe_names() == KNOWN
    assert FOLDER.resolve() == REPOSITORY / "engines"
    readme = (REPOSITORY / "engines" / "README.md").read_text()
    assert all(f"`{name}`" in readme for name in KNOWN)


@pytest.mark.parametrize("name", KNOWN)
def test_a_shipped_recipe_is_valid_and_its_checkpoint_resolves(name):
    recipe = load_recipe(name)
    assert recipe.name == name and recipe == load_recipe(REPOSITORY / "engines" / f"{name}.toml").model_copy(
        update={"file": recipe.file})
    assert recipe.check.atol is None or recipe.check.atol > 0
    source = recipe.checkpoint_source
    if name == "sample":
        assert Path(source) == SAMPLE
    else:
        assert _HUB_ID.fullmatch(source) and source == recipe.checkpoint


def test_block_routing_only_where_it_was_trained():
    modes = {name: load_recipe(name).routing for name in KNOWN}
    assert {name for name, routing in modes.items() if routing.mode == "top_p"} == {"dmoe-16b", "sample"}
    assert modes["dmoe-16b"].top_p == 0.6 and modes["dmoe-16b"].min_experts == 12


def test_a_recipe_can_leave_routing_to_the_checkpoint(tmp_path, tiny_bundle):
    recipe = load_recipe(_write(tmp_path, mode="", block_length="", top_p="", min_experts=""))
    options = recipe.options()
    assert options["routing"] == "auto"
    assert not [name for name in ("block_length", "coreset_top_p", "min_experts", "coreset_size") if options[name]]
    check_bundle(recipe, tiny_bundle.folder, tiny_bundle.manifest)


def test_another_routing_does_not_inherit_the_settings():
    """`--routing token` with a recipe of top_p: its p and guard mean nothing then."""
    build = main.get_command(None, "build")
    for said, kept in (("token", None), ("auto", None), ("top_p", 0.6)):
        context = build.make_context("build", ["--recipe", "sample", "--routing", said])
        options = with_recipe(context, load_recipe("sample"), context.params)
        assert (options["routing"], options["coreset_top_p"], options["block_length"]) == (said, kept, 32)


def test_recipes_of_models_that_edit_say_how_they_are_decoded():
    """Numbers of LLaDA2.1's model card, and of SGLang's for LLaDA2.2."""
    for name in ("llada2.1-mini", "llada2.1-flash"):
        recipe = load_recipe(name)
        assert recipe.decode == {"preset": "quality", "edit_passes": 16} and recipe.routing.mode == "token"
        assert recipe.presets == {"speed": {"threshold": 0.5, "edit_threshold": 0.0},
                                  "quality": {"threshold": 0.7, "edit_threshold": 0.5}}
    recipe = load_recipe("llada2.2-flash")
    assert (recipe.routing.mode, recipe.routing.coreset_size) == ("top_c", 48) and not recipe.presets
    assert recipe.decode == {"threshold": 0.5, "edit_threshold": 0.0, "edit_passes": 16, "insert_delete": True}
    assert not load_recipe("llada2.0-mini").decode  # the program's own defaults are its


PRESETS = "norm_ratio = 0.02\n[decode]\nthreshold = 0.8\nmax_new_tokens = 40\n[presets.speed]\nsteps = 2"


def test_an_export_takes_a_recipes_decoding_and_the_checkpoint_wins(tiny_checkpoint, tmp_path):
    recipe = _write(tmp_path, checkpoint='checkpoint = "./c"', norm_ratio=PRESETS, precision='precision = "fp32"')
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "c")
    (folder / "generation_config.json").write_text('{"max_new_tokens": 9}')
    done = dmoe("export", "--recipe", recipe, "--out", tmp_path / "b", "--routing", "token", "--json")
    manifest = open_bundle(tmp_path / "b").manifest
    assert (manifest.routing.mode, manifest.routing.block_length) == ("token", 32)
    assert manifest.decode_defaults == {"threshold": 0.8, "max_new_tokens": 9}
    assert manifest.presets == {"speed": {"steps": 2}}
    assert "sets max_new_tokens 9, so the 40 that was asked for is no decode default." in done.stderr
    card = (tmp_path / "b" / "README.md").read_text()
    assert "| decode defaults | threshold 0.8, max\\_new\\_tokens 9 |\n| preset speed | steps 2 |\n" in card
    assert "With `--recipe`: decode defaults and presets are those of a recipe." in card
    nothing = dmoe("export", "--out", tmp_path / "n")
    assert nothing.exit_code == 2 and "Name a CHECKPOINT or a --recipe; dmoe-export build" in nothing.stderr


def test_an_export_refuses_what_no_request_of_the_bundle_could_have(tiny_checkpoint, tmp_path):
    for options, sentence in (
            ({"presets": {"speed": {"coreset_size": 4}}}, "Preset speed cannot be exported: coreset_size has no"),
            ({"presets": {"speed": {"edit_threshold": 0.5, "edit_blocks": 1}}},
             "Preset speed cannot be exported: edit_blocks needs a graph .* --multi-block-editing"),
            ({"decode_defaults": {"edit_threshold": 0.5, "insert_delete": True}},
             "A decode default cannot be exported: insert_delete needs the ids .* --edit-tokens"),
            ({"decode_defaults": {"speed": 1}}, "A decode default cannot be exported: speed is no setting of a"),
            ({"decode_defaults": {"preset": "fast"}}, "A decode default cannot be exported: preset is 'fast', but")):
        with pytest.raises(InputError, match=sentence):
            export_checkpoint(tiny_checkpoint, tmp_path / "b", **options)
    assert not (tmp_path / "b").exists()


def test_a_bundle_keeps_its_own_decoding_and_that_is_said(tiny_bundle, tmp_path, capsys):
    recipe = load_recipe(_write(tmp_path, norm_ratio=PRESETS, mode="", block_length="", top_p="", min_experts=""))
    same = tiny_bundle.manifest.model_copy(update={"decode_defaults": dict(recipe.decode), "presets": recipe.presets})
    check_bundle(recipe, tiny_bundle.folder, same)
    assert not capsys.readouterr().err
    for change in ({"presets": {}}, {"decode_defaults": {"threshold": 0.8}}):
        check_bundle(recipe, tiny_bundle.folder, same.model_copy(update=change))
        said = " ".join(capsys.readouterr().err.split())
        assert "keeps its own decode defaults and presets; those of recipe mine come with an export." in said
    check_bundle(recipe.model_copy(update={"multi_block_editing": True}), tiny_bundle.folder, same)
    said = " ".join(capsys.readouterr().err.split())
    assert "was exported without --multi-block-editing, which recipe mine has; it comes with an export." in said


def _write(folder: Path, name: str = "mine", **changes: str) -> Path:
    """A copy of the sample's recipe with lines replaced: field=line."""
    lines = (REPOSITORY / "engines" / "sample.toml").read_text().splitlines()
    for field, line in changes.items():
        (at,) = [i for i, old in enumerate(lines) if old.split(" = ")[0] == field]
        lines[at] = line
    path = folder / f"{name}.toml"
    path.write_text("\n".join(lines))
    return path


def test_a_recipe_can_ask_for_quantised_experts(tmp_path):
    recipe = load_recipe(_write(tmp_path, precision='precision = "int4"\ngroup_size = 32'))
    options = recipe.options()
    assert (options["precision"], options["dense_precision"], options["group_size"]) == ("int4", None, 32)
    assert load_recipe("sample").options()["group_size"] is None


def _table(text: str) -> dict[str, str]:
    """For `_write`: another table behind the last line."""
    return {"norm_ratio": f"norm_ratio = 0.02\n{text}"}


BAD = [
    ({"precision": 'precision = "int8"\ngroup_size = 48'}, "group_size is 48: input should be 32, 64 or 128"),
    ({"precision": 'precision = "fp16"\ndense_precision = "fp16"'},
     "dense_precision and group_size belong to precision int8 or int4, not fp16"),
    ({"precision": 'precision = "fp8"'},
     "precision is 'fp8': input should be 'fp32', 'fp16', 'bf16', 'int8' or 'int4'"),
    ({"precision": ""}, "precision is missing"),
    ({"precision": 'precision = "fp16"\nprecison = 1'}, "precison = 1 is not a field of a recipe; remove it"),
    ({"precision": 'precision = "fp16"\nname = "x"'}, "sets name, which is taken from the file's name"),
    ({"top_p": "top_p = 1.5"}, "routing.top_p is 1.5: input should be less than or equal to 1"),
    ({"mode": 'mode = "token"'}, "routing.min_experts has no meaning with routing.mode token; remove it"),
    ({"mode": 'mode = "top_k"'}, "routing.mode is 'top_k': input should be 'auto', 'token', 'top_p' or 'top_c'"),
    ({"batch": 'batch = "many"'}, "profiles.batch is 'many'"),
    ({"prefill": "prefill = 100"}, "profiles.prefill must be a multiple of routing.block_length, 32"),
    ({"context": "context = 16"}, "profiles.context no less than it"),
    ({"targets": 'targets = ["hopper"]'}, "engine.targets names 'hopper', which is no compute capability"),
    ({"cosine": "cosine = 2"}, "check.cosine is 2"),
    ({"batch": "batch ="}, "is no TOML file"),
    (_table("[decode]\ntreshold = 0.5"), "decode.treshold = 0.5 is no option of a request; remove it"),
    (_table("[decode]\nthreshold = 1.5"), "decode.threshold is 1.5, it must be between 0 and 1."),
    (_table("[decode]\nthreshold = [1]"), "decode.threshold.int is [1]"),
    (_table("[decode]\npreset = 'speed'"), "decode.preset is 'speed', but the presets are none."),
    (_table("[presets.speed]\nsteps = 0.5"), "presets.speed.steps is 0.5, it must be an integer."),
    (_table("[presets.speed]\npreset = 'x'"), "presets.speed.preset is no setting of a preset."),
    (_table("[presets.speed]\nfull_steps = 2"), "presets.speed.full_steps belongs to salient steps"),
    (_table("[presets.Speed]\nsteps = 2"), "presets.Speed.[key] is 'Speed': string should match"),
]


@pytest.mark.parametrize(("changes", "sentence"), BAD, ids=[s[:30] for _, s in BAD])
def test_a_bad_recipe_is_one_sentence_with_file_and_field(tmp_path, changes, sentence):
    path = _write(tmp_path, **changes)
    result = dmoe("build", "--recipe", path)
    assert result.exit_code == 2 and sentence in result.stderr and str(path) in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_recipes_that_are_not_there(tmp_path):
    with pytest.raises(InputError, match=r"Recipe 'llama' is not known; known: diffusion-gemma-26b-a4b, .*sample"):
        load_recipe("llama")
    with pytest.raises(InputError, match="cannot be read: No such file"):
        load_recipe(tmp_path / "none.toml")
    (tmp_path / "latin.toml").write_bytes(b'checkpoint = "\xe9"')
    with pytest.raises(InputError, match="is no TOML file"):
        load_recipe(tmp_path / "latin.toml")
    path = _write(tmp_path, checkpoint='checkpoint = "./nowhere"')
    with pytest.raises(InputError, match=r"checkpoint folder .*nowhere, which does not exist; give another"):
        _ = load_recipe(path).checkpoint_source


def test_list_recipes():
    listed = json.loads(dmoe("build", "--list-recipes", "--json").stdout)
    assert [r["name"] for r in listed] == KNOWN and listed[-1]["engine"]["targets"] == RTX_TARGETS
    shown = dmoe("build", "--list-recipes").stdout
    assert "dmoe-16b" in shown
    nothing = dmoe("build")
    assert nothing.exit_code == 2 and "--list-recipes shows the known ones" in nothing.stderr


@pytest.fixture(scope="module")
def rtx():
    pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed (pip install '.[rtx]')")
    plugin_library()


def test_the_sample_builds_from_its_recipe_alone(rtx, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = built("--recipe", "sample")
    assert report["bundle"] == "engines/sample.bundle"
    manifest = open_bundle(tmp_path / "engines" / "sample.bundle").manifest
    assert manifest.precision == "fp16" and manifest.routing.mode == "top_p"
    assert (manifest.routing.top_p, manifest.routing.min_experts) == (0.6, 6)
    (engine,) = manifest.engines
    prefill = engine.profiles[0]
    assert engine.targets == RTX_TARGETS
    assert (prefill.batch[2], prefill.tokens[2], prefill.past[2]) == (1, 512, 512)
    again = dmoe("build", "--recipe", "sample")
    assert again.exit_code == 2 and "engines/sample.bundle exists already" in again.stderr


def test_the_command_line_wins_and_a_bundle_gets_its_engine_in_place(rtx, tiny_checkpoint, tmp_path):
    recipe = _write(tmp_path, checkpoint='checkpoint = "./nowhere"', context="context = 256", prefill="prefill = 64",
                    batch="batch = 2", top_p="top_p = 0.4")
    out = tmp_path / "out"
    built(tiny_checkpoint, "--recipe", recipe, "--out", out, "--targets", "sm89", "--max-batch", 3, "--min-experts", 5)
    manifest = open_bundle(out).manifest
    (engine,) = manifest.engines
    assert (manifest.routing.mode, manifest.precision) == ("top_p", "fp16")
    assert (manifest.routing.top_p, manifest.routing.min_experts) == (0.4, 5)
    assert engine.targets == ["sm89"] and engine.profiles[0].batch[2] == 3  # said
    assert (engine.profiles[0].tokens[2], engine.profiles[0].past[2]) == (64, 256)  # from the recipe

    planned = built(out, "--recipe", recipe, "--dry-run")
    assert planned["bundle"] == str(out) and planned["engines"][0]["targets"] == RTX_TARGETS


def test_a_bundle_that_was_exported_another_way_is_refused(rtx, tiny_bundle, tmp_path):
    recipe = _write(tmp_path, mode='mode = "token"', top_p="", min_experts="")
    other = dmoe("build", tiny_bundle.folder, "--recipe", recipe)
    assert other.exit_code == 2 and "was exported with routing top_p and recipe mine says token" in other.stderr
    precision = dmoe("build", tiny_bundle.folder, "--recipe", _write(tmp_path))
    assert precision.exit_code == 2 and "is fp32, not fp16; precision is decided at export" in precision.stderr
    said = dmoe("build", tiny_bundle.folder, "--recipe", recipe, "--block-length", 32)
    assert said.exit_code == 2 and "--block-length belong to the export of a checkpoint" in said.stderr


def test_check_takes_a_recipes_limits_for_its_precision_only(tiny_bundle, tmp_path):
    pytest.importorskip("polygraphy", reason="polygraphy is not installed (pip install '.[check]')")
    limits = {}
    for name, cosine in (("loose", "0.5"), ("impossible", "1.0")):
        recipe = _write(tmp_path, name, precision='precision = "fp32"', cosine=f"cosine = {cosine}")
        done = dmoe("check", tiny_bundle.folder, "--recipe", recipe, "--json")
        report = json.loads(done.stdout)
        gates = report["backends"][0]["gates"]
        limits[name] = {g["limit"] for g in gates if g["name"] == "worst cosine"}
        assert {g["limit"] for g in gates if g["name"].startswith("worst norm")} == {0.02}
        assert done.exit_code == (0 if name == "loose" else 1)
    assert limits == {"loose": {0.5}, "impossible": {1.0}}
    other = dmoe("check", tiny_bundle.folder, "--recipe", "sample")
    assert other.exit_code == 2 and "The limits of recipe sample are for fp16 and" in other.stderr


def test_another_flavour_does_not_inherit_the_targets(tmp_path):
    """Targets are those of the recipe's flavour; TensorRT builds for the GPU it finds, and says so without one."""
    result = dmoe("build", "--recipe", "sample", "--flavour", "tensorrt", "--out", tmp_path / "b")
    assert result.exit_code == 3 and "tensorrt" in result.stderr and "leave --targets out" not in result.stderr


def test_without_a_checkout_the_sample_recipe_says_where_its_checkpoint_is_to_be_had(monkeypatch, tmp_path):
    """As in an installed wheel: recipes lie in the package, samples do not."""
    monkeypatch.setattr(recipe, "FOLDER", shutil.copytree(FOLDER, tmp_path / "dmoe_export" / "recipes"))
    result = dmoe("build", "--recipe", "sample")
    assert result.exit_code == 2 and result.stderr == (
        "dmoe-export: Recipe sample needs the folder samples/tiny-dmoe of a checkout of dmoe-export, as an "
        "installation has none; with a checkout, run: dmoe-export build CHECKOUT/samples/tiny-dmoe --recipe sample.\n")
