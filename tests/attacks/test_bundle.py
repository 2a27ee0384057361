"""Hostile bundles whose manifest was sealed again, and files that are none: one sentence, exit code 2, at once."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path

import pytest

from dmoe_export.bundle.card import update
from dmoe_export.bundle.engine_entries import EngineEntry
from dmoe_export.bundle.manifest import Manifest
from dmoe_export.bundle.reader import open_bundle
from dmoe_export.errors import BundleError

HUGE = (2**31, 2**62, 10**30, 10**400)
SIZES = {"batch": (1, 1, 1), "tokens": (32, 64, 128), "past": (1, 256, 512), "rows": (1, 32, 32)}


@pytest.fixture
def bundle(tiny_bundle, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_bundle.folder, tmp_path / "b"))


def refused(bundle: Path, change) -> str:
    """The sentence about a manifest that `change` has edited."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    change(manifest)
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError) as raised:
        open_bundle(bundle, "sizes")
    assert len(str(raised.value)) < 1000 and "\n" not in str(raised.value)
    return str(raised.value)


def _numbers(value, path=()):
    """Places of all integers."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(inner, (*path, key))
    elif isinstance(value, list):
        for i, inner in enumerate(value[:2]):
            yield from _numbers(inner, (*path, i))
    elif isinstance(value, int) and not isinstance(value, bool):
        yield path


FREE = {"version", "opset", "count", "layers_total"}  # said for people; sizes of files are compared with the files


def test_no_number_is_believed(tiny_bundle):
    """Every integer of a manifest, made huge: refused before anything goes by it."""
    raw = json.loads((tiny_bundle.folder / "manifest.json").read_text())
    places = [path for path in _numbers(raw) if path[-1] not in FREE and path[0] != "files"]
    assert len(places) > 25
    for path in places:
        for value in HUGE:
            wrong = copy.deepcopy(raw)
            inner = wrong
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = value
            with pytest.raises((ValueError, OverflowError)):
                Manifest.model_validate(wrong)


@pytest.mark.parametrize(("field", "factor"), [
    ("num_kv_heads", 2), ("head_dim", 2), ("num_layers", 2), ("vocab_size", 2), ("hidden_size", 2), ("num_heads", 64)])
def test_numbers_of_another_model(bundle, field, factor):
    def change(manifest):
        manifest["model"][field] *= factor
    assert "contradicts schema version 2 at its numbers" in refused(bundle, change)


@pytest.mark.parametrize(("change", "words"), [
    (lambda m: m["routing"].update(block_length=10**6), "block_length 1000000 is more than"),
    (lambda m: m["routing"].update(min_experts=17), "min_experts 17 is more than 16"),
    (lambda m: m["routing"].update(mode="top_c"), "inputs, that of a model"),
    (lambda m: m["model"].update(pad_id=96), "pad id 96 is more than 95"),
    (lambda m: m["model"]["moe"].update(experts_per_token=17), "experts_per_token 17 is more than 16"),
    (lambda m: m["denoiser"]["inputs"].pop(), "inputs, that of a model of 2 layers has"),
    (lambda m: m["denoiser"]["outputs"].reverse(), "has the output .* where that of this model is 'token_ids' int64"),
    (lambda m: m["denoiser"]["inputs"][7].update(dtype="float16"), "has the input 'past_key.0' float16"),
    (lambda m: m.update(precision="fp16"), "has the input 'past_key.0' float "),
    (lambda m: m["weights"].update(experts="int8", group_size=32), "weights say experts int8 in groups of 32, and "),
    (lambda m: m["weights"].update(experts=None), "weights say experts None"),
    (lambda m: m["weights"].update(group_size=32), "weights have a group_size where, and only where"),
    (lambda m: m["weights"].update(dense="int4"), "weights have a group_size where, and only where"),
    (lambda m: m["weights"].update(head="int4", group_size=48), "contradicts schema version 2 at weights.group_size"),
    (lambda m: m["weights"].update(experts="bf16"), "slabs of .* bytes are not those of experts"),
    (lambda m: m["files"].append(m["files"][0]), "is there twice"),
    (lambda m: m["files"].append({**m["files"][0], "path": "./" + m["files"][0]["path"]}), "is there twice"),
    (lambda m: m["files"][0].update(path="a\nb"), "has characters that cannot be shown"),
    (lambda m: m["files"][0].update(path="a\0b"), "has characters that cannot be shown"),
    (lambda m: m["files"][0].update(path="\ud800"), "not readable as a manifest"),
])
def test_manifests_that_contradict_themselves(bundle, change, words):
    import re
    assert re.search(words, refused(bundle, change))


@pytest.mark.parametrize(("changes", "words"), [
    ({"profiles": []}, "has not the profiles prefill and denoise"),
    ({"graph": "denoiser.onnx"}, "is of 'denoiser.onnx', which is no salient graph of static shapes"),
    ({"profiles": [{"name": "prefill", **SIZES, "past": (2, 1, 3)}, {"name": "denoise", **SIZES}]}, "2 … 1 … 3"),
    ({"weight_inputs": [{"name": "w", "file": "experts.bin", "offset": 0, "bytes": 4, "dtype": "float16",
                         "shape": [2**40, 2**40]}]}, "has a weight 'w' of shape"),
    ({"expert_pools": [{"slot_of_expert": "s", "gate_up": "g", "down": "d", "gate_up_pool": "gp",
                        "down_pool": "dp"}]}, "has a pool of 'g', which is no weight of it")])
def test_engines_that_contradict_themselves(tiny_bundle, changes, words):
    entry = {
        "file": "e.engine", "flavour": "tensorrt-rtx", "version": "1", "targets": ["sm80"], "precision": "fp16",
        "experts": "external", "experts_op": "plugin", "plugin_build": None, "plugin_nodes": 2, "fallback_nodes": 0,
        "profiles": [{"name": "prefill", **SIZES}, {"name": "denoise", **SIZES}], "weight_inputs": [],
        "expert_pools": [], "flags": [], "made_from": {"denoiser.onnx": "0"},
        "network": {"inputs": [], "outputs": [], "profiles": [], "layers": {}}}
    raw = tiny_bundle.manifest.model_dump() | {"engines": [EngineEntry.model_validate(entry).model_dump()]}
    Manifest.model_validate(raw)
    raw["engines"] = [entry | changes]
    with pytest.raises(ValueError, match=words):
        Manifest.model_validate(raw)


@pytest.mark.parametrize("name", ["manifest.json", "denoiser.onnx", "experts.bin"])
def test_a_fifo_or_a_device_is_not_waited_for(bundle, name):
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        (bundle / name).unlink()
        make(bundle / name)
        with pytest.raises(BundleError, match="no regular file"):
            open_bundle(bundle)


def test_a_fifo_as_bundle_or_card(bundle, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(BundleError, match="it is a file, not a folder"):
        open_bundle(tmp_path / "fifo")
    (bundle / "README.md").unlink(missing_ok=True)
    os.mkfifo(bundle / "README.md")
    assert update(bundle, "check", "body") == "it is no regular file"


def test_a_manifest_without_end_is_read_to_a_bound(bundle):
    with (bundle / "manifest.json").open("r+b") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(BundleError, match="it has more than 16,777,216 bytes"):
        open_bundle(bundle)
