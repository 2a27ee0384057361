"""Presets of a bundle: settings under names, over its decode defaults and under what a request says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bundles import with_decoding
from click.testing import CliRunner

from dmoe_export import Generator, opening
from dmoe_export.bundle.manifest import MANIFEST_NAME
from dmoe_export.bundle.reader import Bundle, open_bundle
from dmoe_export.cli import main
from dmoe_export.decoding.defaults import Defaults
from dmoe_export.errors import BundleError, RequestError

DEFAULTS = {"max_new_tokens": 40, "threshold": 0.9, "preset": "quality"}
PRESETS = {"speed": {"threshold": 0.0, "steps": 8}, "quality": {"threshold": 1.0, "max_new_tokens": 36}}
PROMPT = [[1, 2, 3]]


@pytest.fixture(scope="module")
def bundle(tiny_bundle, tmp_path_factory) -> Bundle:
    return with_decoding(tiny_bundle, tmp_path_factory.mktemp("presets") / "b", DEFAULTS, PRESETS)


@pytest.fixture(scope="module")
def opened(bundle):
    with Generator.open(bundle.folder, threads=1) as opened:
        yield opened


def changed(bundle: Bundle, **fields: object) -> Bundle:
    return Bundle(bundle.folder, bundle.manifest.model_copy(update=fields))


def run(*words: object):
    return CliRunner().invoke(main, [str(word) for word in words])


def test_the_request_wins_over_its_preset_and_that_over_the_defaults(bundle):
    defaults = Defaults(bundle)
    for said, want in (({}, ("quality", 1.0, 36, 32)), ({"preset": "speed"}, ("speed", 0.0, 40, 8)),
                       ({"preset": "speed", "threshold": 0.5, "max_new_tokens": 5}, ("speed", 0.5, 5, 8))):
        settings = defaults.settings(said)
        assert (settings.preset, settings.threshold, settings.max_new_tokens, settings.steps) == want
    fast = Defaults(bundle, "speed")
    assert fast.settings({}).threshold == 0.0 and fast.settings({"preset": "quality"}).threshold == 1.0
    none = Defaults(changed(bundle, decode_defaults={"threshold": 0.9}))
    assert none.settings({}).preset is None and none.settings({}).threshold == 0.9


def test_answers_are_those_of_the_settings_said_one_by_one(bundle, opened):
    fast = opened.generate(PROMPT, preset="speed", eos_id=-1)[0]
    slow = opened.generate(PROMPT, eos_id=-1)[0]
    assert fast.stats.forwards < slow.stats.forwards and len(fast.token_ids) == 40 and len(slow.token_ids) == 36
    with Generator.open(bundle.folder, threads=1, preset="speed") as chosen:
        assert chosen.generate(PROMPT, eos_id=-1)[0].token_ids == fast.token_ids
        assert chosen.generate(PROMPT, eos_id=-1, preset="quality")[0].token_ids == slow.token_ids
    said = opened.generate(PROMPT, preset="speed", eos_id=-1, **PRESETS["quality"] | {"steps": 32})[0]
    assert said.token_ids == slow.token_ids
    blocks = [token for block in opened.stream(PROMPT, preset="speed", eos_id=-1) for token in block.token_ids]
    assert blocks == fast.token_ids


def test_a_preset_that_is_not_there(bundle, opened, tiny_bundle, monkeypatch):
    with pytest.raises(RequestError) as refused:
        opened.generate(PROMPT, preset="fast")
    assert str(refused.value) == f"preset is 'fast', but the presets of {bundle.folder} are speed, quality."
    with pytest.raises(RequestError, match=r"has no presets; leave it out\.$"):
        Defaults(tiny_bundle).settings({"preset": "speed"})
    for wrong in ("", 3, "x" * 101):
        with pytest.raises(RequestError, match=r"^preset is .*, it must be a name of 1 to 100 characters"):
            opened.generate(PROMPT, preset=wrong)
        with pytest.raises(RequestError, match="it must be a name of 1 to 100 characters"):
            Defaults(bundle, wrong)
    monkeypatch.setattr(opening, "open_backend", lambda *_: pytest.fail("a backend was opened"))
    result = run("generate", bundle.folder, "--prompt-ids", "1", "--preset", "fast")
    assert result.exit_code == 2 and "are speed, quality." in " ".join(result.stderr.split())


def with_preset(values: dict[str, object]) -> dict[str, object]:
    return {"presets": PRESETS | {"wild": values}}


@pytest.mark.parametrize(("fields", "reason"), [
    (with_preset({"heat": 2}), "Preset wild of .*: heat is no setting of a request"),
    (with_preset({"temperature": -1}), "Preset wild of .*: temperature is -1, it must be 0 or more"),
    (with_preset({"threshold": True}), "Preset wild of .*: threshold is True, it must be a number"),
    (with_preset({"coreset_size": 4}), "Preset wild of .*: coreset_size has no meaning in this"),
    (with_preset({"preset": "speed"}), "Preset wild of .*: preset is no setting of a preset"),
    (with_preset({"edit_threshold": 0.5, "edit_blocks": 1}), "Preset wild of .*: edit_blocks needs a graph in which"),
    (with_preset({"edit_threshold": 0.5, "insert_delete": True}), "Preset wild of .*: insert_delete needs the ids of"),
    ({"presets": PRESETS | {"off": {}}}, "Preset off of .*: off is no name of a preset"),
    ({"presets": {}}, "The decode_defaults of .*: preset is 'quality', but the presets are none"),
    ({"decode_defaults": {"preset": 3}}, "The decode_defaults of .*: preset is '3', but the presets are speed")])
def test_what_no_request_could_ask_for_is_refused(bundle, fields, reason):
    with pytest.raises(BundleError, match=reason.replace(".*:", ".* cannot be used; export again:")):
        Generator(changed(bundle, **fields), backend=None)


def rewritten(bundle: Bundle, folder: Path, presets: object) -> Path:
    """A folder with this bundle's manifest and other presets in it."""
    raw = json.loads((bundle.folder / MANIFEST_NAME).read_text())
    raw["presets"] = presets
    folder.mkdir()
    (folder / MANIFEST_NAME).write_text(json.dumps(raw))
    return folder


@pytest.mark.parametrize("name", ["Speed", "", "a b", "9", "a" * 33, "a\n", "\u00e4"])
def test_a_name_is_one_that_can_be_shown(bundle, tmp_path, name):
    with pytest.raises(BundleError, match="presets"):
        open_bundle(rewritten(bundle, tmp_path / "b", {name: {"steps": 2}}), "sizes")


def test_bundles_from_before_have_none(tiny_bundle, tmp_path):
    copy = with_decoding(tiny_bundle, tmp_path / "b", {"steps": 4}, {})
    raw = json.loads((copy.folder / MANIFEST_NAME).read_text())
    del raw["presets"]
    (copy.folder / MANIFEST_NAME).write_text(json.dumps(raw))
    older = open_bundle(copy.folder)
    assert older.manifest.presets == {} and Defaults(older).settings({}).steps == 4
    assert "preset" not in run("inspect", copy.folder).stdout


def test_they_are_shown_and_said(bundle):
    shown = " ".join(run("inspect", bundle.folder).stdout.replace("│", " ").split())
    assert "decode defaults max_new_tokens 40, threshold 0.9, preset quality" in shown
    assert "preset speed threshold 0.0, steps 8 preset quality threshold 1.0, max_new_tokens 36" in shown
    manifest = json.loads(run("inspect", bundle.folder, "--json").stdout)["manifest"]
    assert (manifest["decode_defaults"], manifest["presets"]) == (DEFAULTS, PRESETS)
    words = ("generate", bundle.folder, "--prompt-ids", "1,2,3", "--preset", "speed", "--max-new-tokens", 4)
    assert "; by the bundle's decode defaults: threshold 0.0, steps 8, preset speed]" in run(*words).stderr
    assert json.loads(run(*words, "--json").stdout)["decode_defaults"] == {
        "threshold": 0.0, "steps": 8, "preset": "speed"}


EDITED = {"edit_threshold": 0.5, "penalty_lambda": 1.0, "preset": "plain", "stop": "5", "time_limit": 9.0}
PLAIN = {"plain": {"edit_threshold": "off", "steps": 8}}


def test_off_wins_over_preset_and_defaults_and_takes_along_what_belongs_to_it(bundle):
    edited = Defaults(changed(bundle, decode_defaults=EDITED, presets=PLAIN))
    for said, want in (({}, ("plain", None, 0.0, 8)), ({"preset": "off"}, (None, 0.5, 1.0, 32)),
                       ({"preset": "off", "edit_threshold": "off"}, (None, None, 0.0, 32))):
        settings = edited.settings(said)
        assert (settings.preset, settings.edit_threshold, settings.penalty_lambda, settings.steps) == want
    assert edited.given({"preset": "off", "edit_threshold": "off"}) == {"stop": "5", "time_limit": 9.0}
    assert edited.settings({"stop": [], "time_limit": "off"}).stops == () and edited.settings({}).stops == ("5",)
    none = Defaults(changed(bundle, decode_defaults=EDITED, presets=PLAIN), "off")
    assert none.settings({}).preset is None and none.settings({"preset": "plain"}).steps == 8
    with pytest.raises(RequestError, match=r"^penalty_lambda belongs to editing"):
        edited.settings({"edit_threshold": "off", "penalty_lambda": 1.0})
    with pytest.raises(RequestError, match=r"^steps is 'off', it must be an integer\.$|^steps is off"):
        edited.settings({"steps": "off"})
    with pytest.raises(RequestError, match=r"^edit_threshold is 'never', it must be a number, or off\.$"):
        edited.settings({"edit_threshold": "never"})


def test_the_command_line_says_off(tiny_bundle, tmp_path):
    copy = with_decoding(tiny_bundle, tmp_path / "b", EDITED, PLAIN)
    words = ("generate", copy.folder, "--prompt-ids", "1,2,3", "--max-new-tokens", 4, "--json", "--stop", "")
    taken = [json.loads(run(*words, *more).stdout)["decode_defaults"] for more in (
        (), ("--preset", "off"), ("--preset", "off", "--edit-threshold", "off", "--time-limit", "off"))]
    assert taken == [{"time_limit": 9.0, "steps": 8, "preset": "plain"},
                     {"edit_threshold": 0.5, "penalty_lambda": 1.0, "time_limit": 9.0}, {}]
    assert run(*words, "--steps", "off").exit_code == 2
