"""Files of a checkpoint that are no files, too large, too deep, or hold what no model has: one sentence, at once."""

from __future__ import annotations

import json
import os
import struct
import time

import pytest
from conftest import SAMPLE
from pydantic import ValidationError

from dmoe_export.checkpoint.family import Checkpoint
from dmoe_export.checkpoint.text import read_text_side
from dmoe_export.description import ModelDescription
from dmoe_export.errors import CheckpointError
from dmoe_export.export.licence import front_matter
from dmoe_export.guards.regular_file import MOST_CONFIG, MOST_TABLE, read_regular

CONFIGS = ("config.json", "generation_config.json", "quantize_config.json", "model.safetensors.index.json")
TEXTS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
         "chat_template.json", "chat_template.jinja", "additional_chat_templates/x.jinja")


@pytest.fixture
def folder(tmp_path):
    """The sample, as links; a file in place of one is written after `clear`."""
    for path in SAMPLE.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


def clear(folder, name):
    path = folder / name
    if path.is_symlink():
        path.unlink()
    if name.startswith(("chat_template.json", "additional")):
        (folder / "chat_template.jinja").unlink()
    if name == "added_tokens.json":
        (folder / "tokenizer_config.json").unlink()
    path.parent.mkdir(exist_ok=True)
    return path


def read(folder):
    checkpoint = Checkpoint(folder)
    read_text_side(folder, checkpoint.full_description)


def refused(folder, words):
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match=words) as caught:
        read(folder)
    said = str(caught.value)
    assert "\n" not in said and said.endswith(".") and len(said) < 1000 + len(str(folder))
    assert time.perf_counter() - start < 30


def sparse(path):
    with path.open("wb") as file:
        file.truncate(40 << 30)


KINDS = {"fifo": (os.mkfifo, "no regular file"), "endless": (lambda p: p.symlink_to("/dev/zero"), "no regular file"),
         "huge": (sparse, "more than [0-9,]+ bytes"), "folder": (lambda p: p.mkdir(), "no regular file")}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*CONFIGS, *TEXTS])
def test_what_is_no_file_of_that_kind(folder, name, kind):
    make, words = KINDS[kind]
    make(clear(folder, name))
    refused(folder, words)


@pytest.mark.parametrize("make", [os.mkfifo, lambda p: p.symlink_to("/dev/zero")])
def test_weights_that_are_no_file(folder, make):
    make(clear(folder, "model.safetensors"))
    refused(folder, "model.safetensors cannot be read: it is no regular file")


def test_a_file_without_a_size_is_bounded_too(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 5)
    assert read_regular(tmp_path / "a", 5) == b"x" * 5
    with pytest.raises(OSError, match="more than 4 bytes"):
        read_regular(tmp_path / "a", 4)
    with pytest.raises(OSError, match="more than"):
        read_regular(type(tmp_path)("/proc/self/maps"), 100)  # its size is 0
    assert MOST_CONFIG < MOST_TABLE


@pytest.mark.parametrize("name", [*CONFIGS, *(name for name in TEXTS if name.endswith(".json"))])
@pytest.mark.parametrize("text", ['{"a":' * 50_000 + "1" + "}" * 50_000, '{"a":' + "[" * 50_000 + "]" * 50_000 + "}"],
                         ids=["objects", "lists"])
def test_json_in_json_without_end(folder, name, text):
    clear(folder, name).write_text(text)
    refused(folder, "nested too deeply|recursion")


CONFIG = json.loads((SAMPLE / "config.json").read_text())
SIZES = [name for name, value in CONFIG.items() if isinstance(value, int) and not isinstance(value, bool)]


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("value", [2**62, 10**400, 10**5000, -1, True, "4", "٤", [4], {"a": 1}, 1e300, "x" * 10**6,
                                   list(range(10**5))], ids=lambda value: repr(value)[:12] if not isinstance(
                                       value, int) or value < 2**63 else f"10^{len(bin(value)) // 3}")
def test_sizes_that_are_none(folder, name, value):
    if name == "eos_token_id" and value == [4]:
        return  # a list of ids
    number = "1" + "0" * 5000 if value == 10**5000 else None  # Python itself refuses to write it
    text = json.dumps(CONFIG | {name: 5050 if number else value})
    clear(folder, "config.json").write_text(text.replace("5050", number) if number else text)
    refused(folder, name if number is None else "cannot be read as JSON")


@pytest.mark.parametrize("value", [10**7 * 2, 2**31 - 1])
def test_positions_that_no_memory_holds(folder, value):
    """Memory of a request is asked for by positions, so a checkpoint must not choose them freely."""
    clear(folder, "config.json").write_text(json.dumps(CONFIG | {"max_position_embeddings": value}))
    refused(folder, f"max_position_embeddings is {value}, which is more than 16777216")


@pytest.mark.parametrize(("field", "value"), [
    ("max_positions", 2**31), ("num_layers", 2**62), ("vocab_size", 2**31), ("rope_theta", float("nan")),
    ("rms_eps", float("inf")), ("head_dim", 2**62)])
def test_a_description_has_the_same_bounds(folder, field, value):
    """It is also what a bundle's manifest says of its model."""
    good = Checkpoint(folder).description.model_dump()
    with pytest.raises(ValidationError, match=field):
        ModelDescription.model_validate(good | {field: value})


@pytest.mark.parametrize("name", ["rope_theta", "rms_norm_eps", "routed_scaling_factor", "core_threshold"])
@pytest.mark.parametrize("value", [1e300, 1e-320, -1e39])
def test_numbers_that_float32_does_not_have(folder, name, value):
    from dmoe_export.export.routing import trained_routing

    clear(folder, "config.json").write_text(json.dumps(CONFIG | {name: value}))
    with pytest.raises(CheckpointError, match=f"{name} is .*float32"):
        trained_routing(Checkpoint(folder))


@pytest.mark.parametrize(("change", "words"), [
    ({"architectures": ["x" * 10**6]}, "names architecture .* …"), ({"architectures": list(range(10**5))}, " …, which"),
    ({"quantization_config": "x" * 10**6}, "expected an object"),
    ({"quantization_config": {"quant_method": "x" * 10**6}}, "quantised by x{60}, which")])
def test_long_values_do_not_fill_a_sentence(folder, change, words):
    clear(folder, "config.json").write_text(json.dumps(CONFIG | change))
    refused(folder, words)


@pytest.mark.parametrize(("name", "content", "words"), [
    ("added_tokens.json", '{"<x>": 1e400}', "id inf, which is no number"),
    ("added_tokens.json", '{"<x>": "١٢"}', "which is no number"), ("added_tokens.json", '{"<x>": true}', "no number"),
    ("tokenizer_config.json", '{"bos_token": "\\ud800"}', "which is no token"),
    ("tokenizer_config.json", '{"added_tokens_decoder": {"٤": "<x>"}}', "which is no number"),
    ("tokenizer_config.json", json.dumps({"bos_token": "x" * 10**6}), "which is no token"),
    ("special_tokens_map.json", '{"bos_token": {"content": "\\ud800"}}', "which is no token")])
def test_tokens_that_are_none(folder, name, content, words):
    clear(folder, name).write_text(content)
    refused(folder, words)


def test_a_template_that_is_not_utf8(folder):
    clear(folder, "chat_template.jinja").write_bytes(b"\xe9{{")
    refused(folder, "chat_template.jinja cannot be read as text")


def with_tensor(folder, name):
    content = (SAMPLE / "model.safetensors").read_bytes()
    size, = struct.unpack("<Q", content[:8])
    header = json.loads(content[8:8 + size]) | {name: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}
    text = json.dumps(header).encode()
    clear(folder, "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size:])


@pytest.mark.parametrize(("name", "words"), [
    ("model.layers." + "9" * 900 + ".x", "has no place in family"), ("model.layers.٤.x", "has no place"),
    ("model.layers." + "9" * 5000 + ".x", "name has 5015 characters"), ("x" * 10**6, "name has 1000000 characters")])
def test_tensors_by_names_that_are_none(folder, name, words):
    with_tensor(folder, name)
    refused(folder, words)


@pytest.mark.parametrize("shard", ["x" * 5000 + ".safetensors", "a/" * 3000 + "x.safetensors", "a\0.safetensors"])
def test_an_index_of_files_that_cannot_be(folder, shard):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": shard}}))
    (folder / "model.safetensors").unlink()
    refused(folder, "is missing|no safetensors file")


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 101 << 20, 0])
def test_headers_of_a_length_that_is_none(folder, length):
    clear(folder, "model.safetensors").write_bytes(struct.pack("<Q", length) + b"{}")
    refused(folder, "truncated or damaged")


def test_a_card_whose_yaml_is_a_bomb(tmp_path):
    lines = ["a0: &a0 {x: 1}"] + [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 40)]
    (tmp_path / "README.md").write_text("---\n" + "\n".join(lines) + "\n---\n")
    assert front_matter(tmp_path / "README.md") is None
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    assert front_matter(tmp_path / "README.md") == {"license": "mit"}
