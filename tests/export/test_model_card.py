"""README.md of a bundle: what an export writes, what a build and a check change, and what nobody may break with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from check_reports import failing
from check_reports import report as check_report
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from dmoe_export.bundle import card
from dmoe_export.bundle.engines import add_engine, copied_bundle, engine_file
from dmoe_export.bundle.origin import CheckpointEntry
from dmoe_export.bundle.reader import open_bundle
from dmoe_export.bundle.writer import BundleWriter
from dmoe_export.check.card import in_markdown, record
from dmoe_export.cli import main
from dmoe_export.description import RoutingDescription
from dmoe_export.export.licence import Licence, copy_licence, front_matter
from dmoe_export.export.model_card import export_command, model_card, source_name, without_path


@pytest.fixture
def copy(sample_bundle, tmp_path) -> Path:
    return Path(shutil.copytree(sample_bundle.folder, tmp_path / "copy"))


def head(text: str) -> dict[str, object]:
    return yaml.safe_load(text.split("---\n")[1])


def test_an_export_writes_a_card(sample_bundle):
    manifest, text = sample_bundle.manifest, (sample_bundle.folder / "README.md").read_text()
    assert text.startswith("---\n") and head(text) == {
        "license": "unknown", "library_name": "dmoe-export", "pipeline_tag": "text-generation",
        "tags": ["dmoe-export", "onnx", "diffusion-language-model", "llada2_moe"]}
    assert manifest.checkpoint.source == "tiny-dmoe" and manifest.checkpoint.identity in text
    assert "not known: the checkpoint names none" in text and "Not run." in text
    assert all(f"| {card.cell(f.path)} | {f.size:,} |" in text for f in manifest.files)
    assert str(Path.cwd()) not in text and "/tmp" not in text
    assert "README.md" not in {f.path for f in manifest.files}


def test_of_a_hub_s_checkpoint(sample_bundle):
    entry = CheckpointEntry(identity="i", layers_total=20, source="inclusionAI/LLaDA2.0-mini", parts=["p"])
    manifest = sample_bundle.manifest.model_copy(update={"checkpoint": entry, "warnings": ["a <b> | c_d"]})
    text = model_card(manifest, Licence("apache-2.0"))
    assert head(text) | {"tags": []} == {
        "license": "apache-2.0", "library_name": "dmoe-export", "pipeline_tag": "text-generation", "tags": [],
        "base_model": "inclusionAI/LLaDA2.0-mini", "base_model_relation": "quantized"}
    assert "# LLaDA2.0-mini for dmoe-export" in text and "the first of 20" in text
    assert "* a &lt;b&gt; \\| c\\_d" in text


def test_the_command_makes_the_same_again(sample_bundle, salient_llada):
    assert export_command(salient_llada.manifest).endswith(
        " --precision fp32 --compute fp32 --block-length 8 --salient --salient-capacity 8")
    route = RoutingDescription(mode="top_c", block_length=16, top_p=1, min_experts=6, coreset_size=12,
                               reason="asked for; trained with token")
    manifest = sample_bundle.manifest.model_copy(update={"routing": route})
    words = export_command(manifest).split()
    assert words[:3] == ["dmoe-export", "export", "tiny-dmoe"]
    assert words[-6:] == ["--block-length", "16", "--routing", "top_c", "--coreset-size", "12"]
    options = {name for parameter in main.get_command(None, "export").params for name in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= options


@pytest.mark.parametrize(("readme", "files", "fields", "words"), [
    (None, (), {"license": "unknown"}, "not known: the checkpoint names none"),
    ("# no front matter\n", (), {"license": "unknown"}, "not known"),
    ("---\nlicense: apache-2.0 # yes\n---\n", (), {"license": "apache-2.0"}, "says apache-2.0"),
    ("\ufeff---\r\nlicense: [mit]\r\n---\r\nx", ("LICENSE",), {"license": "mit"}, "says mit; its text: LICENSE"),
    ("---\nlicense: other\nlicense_name: a: b\n---\n", ("LICENSE",), {"license": "other", "license_link": "LICENSE"},
     "the front matter of its README.md cannot be read; its text: LICENSE"),
    ("---\nlicense: other\nlicense_name: \"a: b\"\nlicense_link: LICENSE.md\n---\n", ("LICENSE.md", "NOTICE"),
     {"license": "other", "license_name": "a: b", "license_link": "LICENSE.md"}, "says other (a: b); its text"),
    ("---\nlicense: other\nlicense_link: https://x.org/l\n---\n", (),
     {"license": "other", "license_link": "https://x.org/l"}, "says other"),
    ("---\nlicense: other\nlicense_link: ../../etc/passwd\n---\n", (), {"license": "other"}, "says other"),
    (None, ("Licence.txt",), {"license": "other", "license_link": "Licence.txt"}, "names none; its text: Licence.txt"),
    (None, ("NOTICE",), {"license": "unknown"}, "names none; its text: NOTICE"),
    ("---\nlicense: 3\n---\n", (), {"license": "unknown"}, "not known"),
    ("---\n- a\n---\n", (), {"license": "unknown"}, "cannot be read")])
def test_the_licence_is_read_not_guessed(tmp_path, readme, files, fields, words):
    checkpoint = tmp_path / "c"
    (checkpoint / "LICENSES").mkdir(parents=True)
    for name in files:
        (checkpoint / name).write_text("terms")
    if readme is not None:
        (checkpoint / "README.md").write_bytes(readme.encode())
    with BundleWriter(tmp_path / "b") as writer:
        licence = copy_licence(checkpoint, writer)
        assert [entry.path for entry in writer.entries] == sorted(files)
        assert all((writer.folder / name).read_text() == "terms" for name in files)
    assert licence.fields == fields and words in licence.in_words and not licence.warnings


@pytest.mark.parametrize(("folder", "target", "copied"), [
    ("c", "text", True), ("c", "../secret", False), ("c", "up/secret", False), ("snapshots/1", "../../blobs/1", True),
    ("snapshots/1", "../../secret", False), ("other/1", "../../blobs/1", False)])
def test_a_text_that_a_link_brings_from_elsewhere_is_not_copied(tmp_path, folder, target, copied):
    """A checkpoint of somebody else must not put files of this machine into a bundle that may be published."""
    checkpoint = tmp_path / folder
    checkpoint.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    for path in (checkpoint / "text", tmp_path / "secret", tmp_path / "blobs/1"):
        path.write_text("private")
    (checkpoint / "up").symlink_to("../" * len(Path(folder).parts))
    (checkpoint / "LICENSE").symlink_to(target)
    with BundleWriter(tmp_path / "b") as writer:
        licence = copy_licence(checkpoint, writer)
        assert [path.name for path in writer.folder.iterdir()] == ["LICENSE"] * copied
    assert (licence.files == ("LICENSE",)) == copied
    assert copied or "LICENSE of the checkpoint is a link that leaves its folder" in "".join(licence.warnings)


def test_front_matter_ends_where_it_ends(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\ntext\n---\nlicense: gpl\n---\n")
    assert front_matter(tmp_path / "README.md") == {"license": "mit"}


def test_a_source_is_no_path_of_this_machine(tmp_path, monkeypatch):
    cached = tmp_path / "models--org--Some-Model" / "snapshots" / "abc"
    cached.mkdir(parents=True)
    assert source_name(cached) == "org/Some-Model" and source_name("org/name") == "org/name"
    assert source_name(f"{tmp_path}/") == tmp_path.name
    monkeypatch.chdir(cached.parent)
    assert source_name(".") == "snapshots" and source_name("abc") == "org/Some-Model"


@pytest.mark.parametrize(("folder", "sentence", "want"), [
    ("/home/me/m", "The template of /home/me/m is broken: line 1.", "The template of NAME is broken: line 1."),
    ("/home/me/m", "/home/me/m/config.json sets a, /home/me/m2 not.", "NAME/config.json sets a, /home/me/m2 not."),
    (".", "config.json sets x 1.2. The file of . is broken.", "config.json sets x 1.2. The file of NAME is broken."),
    ("/home/me/m", "There is none in /home/me/m. It ends in /home/me/m.", "There is none in NAME. It ends in NAME."),
    ("m", "m/config.json sets more in me.", "NAME/config.json sets more in me.")])
def test_warnings_name_no_place(folder, sentence, want):
    assert without_path(sentence, Path(folder), "NAME") == want


@given(st.text(), st.text(), st.text())
def test_parts_are_replaced_whatever_they_hold(before, body, after):
    text = f"{before}\n{card.section('check', 'old')}{after}"
    if "<!-- dmoe-export" in before + body + after:
        return
    new = card.replaced(text, "check", body)
    normal = text.replace("\r\n", "\n")
    assert new is not None and new.startswith(normal[:normal.index("<!--")])
    assert body.strip().replace("\r\n", "\n") in new.replace("\r\n", "\n")
    assert card.replaced(new, "check", "old") == normal


def test_a_check_goes_into_the_card(copy):
    """Whatever it found; the bundle stays as valid as it was."""
    good, bad = check_report(), failing()
    assert record(good, copy) is None and good.verdict in (copy / "README.md").read_text()
    assert record(bad, copy) is None
    text = (copy / "README.md").read_text()
    assert "| result | FAILED |" in text and good.verdict not in text and "Not run" not in text
    assert head(text) and open_bundle(copy)


def test_a_card_that_cannot_be_changed_is_said(copy, monkeypatch):
    readme = copy / "README.md"
    readme.write_text("mine\n")
    assert record(check_report(), copy) == f"{readme} does not have this result: its marks were removed."
    assert readme.read_text() == "mine\n"
    readme.write_bytes(b"\xff\xfe")
    assert "no text in UTF-8" in record(check_report(), copy)
    readme.unlink()
    assert record(check_report(), copy) is None and not readme.exists()  # a bundle from before there were cards


def test_a_card_that_is_a_link_leaves_what_it_points_to(copy, tmp_path):
    blob = tmp_path / "blob"
    shutil.move(copy / "README.md", blob)
    (copy / "README.md").symlink_to(blob)
    before = blob.read_bytes()
    assert record(check_report(), copy) is None
    assert blob.read_bytes() == before and not (copy / "README.md").is_symlink()


def test_no_path_of_this_machine_gets_into_it(tmp_path):
    report = check_report().model_copy(update={
        "bundle": "/home/me/b", "reference": str(tmp_path / "ck"), "reference_kind": "checkpoint",
        "verdict": f"{tmp_path / 'ck'} is not what /home/me/b was made from."})
    text = in_markdown(report)
    assert str(tmp_path) not in text and "/home/me" not in text and "ck is not what the bundle was made from" in text


def test_an_engine_goes_into_the_card(copy, tmp_path):
    from linked_layouts import ENGINE
    with copied_bundle(open_bundle(copy), tmp_path / "other", overwrite=False) as folder, \
            engine_file(folder, ENGINE.file) as path:
        path.write_bytes(b"engine")
        add_engine(folder, path, ENGINE)
    assert f"| {ENGINE.file} | 6 |" in (tmp_path / "other" / "README.md").read_text()
    assert ENGINE.file not in (copy / "README.md").read_text()


def test_from_the_command_line(copy, monkeypatch):
    monkeypatch.setattr("dmoe_export.check.run.check_bundle", lambda *_, **__: check_report())
    (copy / "README.md").write_text("mine")
    run = CliRunner().invoke(main, ["check", str(copy), "--json"])
    assert json.loads(run.stdout) and "its marks were removed" in run.stderr
