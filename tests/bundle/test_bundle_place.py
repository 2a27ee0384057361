"""A good bundle is never lost: what a new one must be before it takes the name, and how the names change."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmoe_export.bundle import place, writer
from dmoe_export.bundle.finite import not_finite
from dmoe_export.bundle.reader import check_unchanged, hash_file, open_bundle, read_manifest
from dmoe_export.bundle.writer import BundleWriter, write_manifest
from dmoe_export.errors import BundleError, OutputError


@pytest.fixture
def old(tiny_bundle, tmp_path) -> Path:
    """A good bundle in a folder of its own."""
    return Path(shutil.copytree(tiny_bundle.folder, tmp_path / "place" / "b"))


def state(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rewrite(bundle, target: Path, **changes):
    """Write the bundle anew over `target`, with a manifest that may be wrong."""
    with BundleWriter(target, overwrite=True) as new:
        for entry in bundle.manifest.files:
            shutil.copyfile(bundle.folder / entry.path, new.folder / entry.path)
            new.add_file(entry.path)
        new.seal(bundle.manifest.model_copy(update={"files": new.entries} | changes))


def other_routing(bundle, **changes):
    return {"routing": bundle.manifest.routing.model_copy(update=changes)}


@pytest.mark.parametrize("field", ["rope_theta", "rms_eps"])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_numbers_that_json_cannot_say(tiny_bundle, old, field, value):
    before = state(old.parent)
    model = tiny_bundle.manifest.model.model_copy(update={field: value})
    with pytest.raises(OutputError, match=rf"model\.{field} is (-?inf|nan), which is no number for a manifest"):
        rewrite(tiny_bundle, old, model=model)
    assert state(old.parent) == before


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"created_by": 3}, "cannot be read back"),
    ({"tokenizer": {"file": "nowhere.json", "chat_template": None, "special_tokens": {}}},
     "cannot be read back .*nowhere.json"),
    ({"schema_version": 1}, "cannot be read back .*schema version 1")])
@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
def test_what_cannot_be_read_back_does_not_take_the_name(tiny_bundle, old, changes, sentence):
    before = state(old.parent)
    with pytest.raises(OutputError, match=sentence):
        rewrite(tiny_bundle, old, **changes)
    assert state(old.parent) == before


def test_a_file_that_the_disk_cut_short_is_seen(tiny_bundle, old, monkeypatch):
    before, write = state(old.parent), write_manifest

    def cut(folder, manifest):
        write(folder, manifest)
        os.truncate(folder / "experts.bin", 100)
    monkeypatch.setattr(writer, "write_manifest", cut)
    with pytest.raises(OutputError, match=r"cannot be read back \(.*experts.bin has 100 bytes"):
        rewrite(tiny_bundle, old)
    assert state(old.parent) == before


@pytest.mark.parametrize("exchange", [True, False])
def test_there_is_a_whole_bundle_at_every_moment(tiny_bundle, old, monkeypatch, exchange):
    """Where names are exchanged; elsewhere there are two renames, and nothing is left behind either."""
    if exchange:
        names = [old.parent / name for name in "xy"]
        for name in names:
            name.mkdir()
        if not place._exchange(*names):
            pytest.skip("this file system exchanges no names")
        for name in names:
            name.rmdir()
    else:
        monkeypatch.setattr(place, "_exchange", lambda one, other: False)
    missing, stop = [], threading.Event()

    def watch():
        while not stop.is_set():
            try:
                read_manifest(old)
            except BundleError as error:
                missing.append(error)
    watcher = threading.Thread(target=watch)
    watcher.start()
    for length in (4, 16, 32) * 3:
        rewrite(tiny_bundle, old, **other_routing(tiny_bundle, block_length=length))
    stop.set()
    watcher.join()
    assert not (exchange and missing)
    assert open_bundle(old).manifest.routing.block_length == 32 and [p.name for p in old.parent.iterdir()] == ["b"]


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rename_that_fails_changes_nothing(tiny_bundle, old, monkeypatch, failing):
    monkeypatch.setattr(place, "_exchange", lambda one, other: False)
    before, calls, rename = state(old), [], Path.rename

    def refuse(self, target):
        calls.append(self)
        if len(calls) == failing + 1:
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)
    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OutputError, match="could not be written: Input/output error; nothing was left behind"):
        rewrite(tiny_bundle, old)
    assert state(old) == before and [p.name for p in old.parent.iterdir()] == ["b"]


def test_a_crash_between_two_renames_is_explained(tiny_bundle, old, monkeypatch):
    """Where names cannot be exchanged. The old bundle is whole, and the sentence says where."""
    monkeypatch.setattr(place, "_exchange", lambda one, other: False)
    rename = Path.rename

    def crash(self, target):
        rename(self, target)
        raise KeyboardInterrupt  # stands for the end of the process: nobody tidies up
    monkeypatch.setattr(Path, "rename", crash)
    new = Path(shutil.copytree(tiny_bundle.folder, old.with_name(".b.partial-x")))
    with pytest.raises(KeyboardInterrupt):
        place.put_in_place(new, old)
    with pytest.raises(BundleError, match=r"it does not exist, but was being .* is now .*\.b\.partial-x\.old"):
        open_bundle(old)
    assert open_bundle(old.with_name(".b.partial-x.old"))


def test_a_reader_keeps_the_old_one(tiny_bundle, old):
    with (old / "experts.bin").open("rb") as held:
        before = held.read(4096)
        rewrite(tiny_bundle, old, **other_routing(tiny_bundle, block_length=16))
        held.seek(0)
        assert held.read(4096) == before


def test_an_old_one_that_stays_is_said(tiny_bundle, old, monkeypatch):
    def refuse(path, ignore_errors=False):
        if not ignore_errors:
            raise PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(place.shutil, "rmtree", refuse)
    with pytest.raises(OutputError, match=r"is the new bundle, but the old one could not be removed \(Permission"):
        rewrite(tiny_bundle, old, **other_routing(tiny_bundle, block_length=16))
    assert open_bundle(old).manifest.routing.block_length == 16


def test_a_full_disk_leaves_the_old_one(tiny_bundle, old, monkeypatch):
    before = state(old.parent)

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="could not be written: No space left on device; nothing was left behind"):
        rewrite(tiny_bundle, old)
    assert state(old.parent) == before


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_manifest_with_such_a_number_is_none(old, text):
    manifest = json.loads((old / "manifest.json").read_text())
    manifest["model"]["rope_theta"] = "HERE"
    (old / "manifest.json").write_text(json.dumps(manifest).replace('"HERE"', text))
    with pytest.raises(BundleError, match=r"is not readable as a manifest \(.*model\.rope_theta is (-?inf|nan)"):
        open_bundle(old)


def test_a_manifest_nested_past_all_reason_is_none(old):
    (old / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(BundleError, match="is not readable as a manifest"):
        open_bundle(old)


@given(st.recursive(st.floats() | st.integers() | st.text() | st.none(),
                    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_not_finite_is_what_json_refuses(value):
    try:
        json.dumps(value, allow_nan=False)
        refused = False
    except ValueError:
        refused = True
    assert (not_finite(value) is not None) == refused


def test_late_openers_do_not_mix_two_bundles(tiny_bundle, old):
    """As a salient graph is opened when the first step wants it."""
    opened = open_bundle(old)
    check_unchanged(opened)
    rewrite(tiny_bundle, old, **other_routing(tiny_bundle, block_length=16))
    check_unchanged(opened)  # the same files
    with (old / "experts.bin").open("r+b") as file:
        file.write(b"other")
    write_manifest(old, tiny_bundle.manifest.model_copy(update={"files": [
        entry.model_copy(update={"sha256": hash_file(old / entry.path)}) for entry in tiny_bundle.manifest.files]}))
    with pytest.raises(BundleError, match="was changed or removed while it was in use"):
        check_unchanged(opened)
    shutil.rmtree(old)
    with pytest.raises(BundleError, match="does not exist"):
        check_unchanged(opened)
