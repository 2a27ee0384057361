"""Hostile checkpoints: config.json, generation_config.json, safetensors headers and indices, for `export`."""

from __future__ import annotations

import json
import os
import random
import struct
from pathlib import Path

from .. import mutate
from ..case import FAMILIES, Base, Case, answer, linked, replace


def _case(done: str, base: Base, folder: Path, *options: str, same: bool = False) -> Case:
    out = folder / "out" / "bundle"
    return Case(
        done,
        [["export", str(folder / "checkpoint"), "--out", str(out), *options], answer(out)],
        tokens=base.tokens if same else None,
    )


def config(rng: random.Random, base: Base, folder: Path) -> Case:
    """config.json of every family: its fields, a quantised one, and the text it is."""
    family = rng.choice(["tiny", "tiny", *FAMILIES])
    path = linked(base.checkpoint(family), folder / "checkpoint") / "config.json"
    whole = json.loads(path.read_text())
    what = rng.random()
    if what < 0.1:
        done, same = f"{family}: the same, written otherwise", True
        replace(path, mutate.same(rng, whole))
    elif what < 0.25:
        (data, done), same = mutate.text(rng, path.read_bytes()), False
        replace(path, data)
    else:
        if what < 0.4:
            whole["quantization_config"] = rng.choice(
                [
                    {"quant_method": "fp8", "weight_block_size": [128, 128]},
                    {"quant_method": "awq", "bits": 4, "group_size": 32},
                    {"quant_method": "gptq", "bits": 4},
                    {"quant_method": "compressed-tensors", "config_groups": {}},
                ]
            )
        if what > 0.9:
            whole["rope_parameters" if what > 0.95 else "rope_scaling"] = {
                "rope_type": rng.choice(["default", "yarn", "linear", "dynamic"]),
                "factor": mutate.value(rng, 4.0),
                "rope_theta": mutate.value(rng, 1e4),
            }
        (whole, done), same = mutate.tree(rng, whole), False
        replace(path, json.dumps(whole))
    return _case(f"{family}: {done}", base, folder, same=same and family == "tiny")


def generation_config(rng: random.Random, base: Base, folder: Path) -> Case:
    """generation_config.json: its fields and the text it is."""
    path = linked(base.checkpoint(), folder / "checkpoint") / "generation_config.json"
    fields = {
        "eos_token_id": [1],
        "max_new_tokens": 16,
        "do_sample": True,
        "temperature": 0.5,
        "top_k": 5,
        "top_p": 0.9,
        "block_length": 32,
        "steps": 32,
        "threshold": 0.9,
        "max_length": 200,
        "bos_token_id": 3,
        "mask_token_id": 2,
        "pad_token_id": 1,
        "transformers_version": "4.50",
    }
    kept = dict(rng.sample(sorted(fields.items()), rng.randrange(1, len(fields))))
    if rng.random() < 0.2:
        data, done = mutate.text(rng, json.dumps(kept).encode())
    else:
        whole, done = mutate.tree(rng, kept)
        data = json.dumps(whole).encode()
    replace(path, data)
    return _case(done, base, folder)


def header(rng: random.Random, base: Base, folder: Path) -> Case:
    """The header of a safetensors file, and its numbers."""
    path = linked(base.checkpoint(), folder / "checkpoint") / "model-00001.safetensors"
    old = path.read_bytes()
    (length,) = struct.unpack("<Q", old[:8])
    names, body = json.loads(old[8 : 8 + length]), old[8 + length :]
    what = rng.random()
    if what < 0.15:
        data, done = mutate.raw(rng, old[: 8 + length])
        new = data + body
    elif what < 0.25:
        length = rng.choice(
            [*(n for n in mutate.NUMBERS if isinstance(n, int) and 0 <= n < 2**64), length + 1, length - 1]
        )
        new, done = struct.pack("<Q", length) + old[8:], f"header of {length} bytes"
    elif what < 0.35:
        data, done = mutate.raw(rng, body)
        new = old[: 8 + length] + data
    elif what < 0.45:
        data, done = mutate.text(rng, old[8 : 8 + length])
        new = struct.pack("<Q", len(data)) + data + body
    else:
        name = rng.choice(sorted(names))
        if what < 0.6 and name != "__metadata__":
            begin, end = names[name]["data_offsets"]
            choices = {
                "dtype": ["F16", "BF16", "F64", "I32", "I64", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F4", "f32", "", 3],
                "shape": [[], [0], [2**32, 2**32], [-1], names[name]["shape"][::-1], names[name]["shape"] + [1]],
                "data_offsets": [
                    [end, begin],
                    [begin, 2**63],
                    [0, 0],
                    [begin + 1, end + 1],
                    [-1, end],
                    [begin, end - 4],
                    [0, len(body)],
                    [begin],
                    [2**64, 2**64],
                ],
            }
            field = rng.choice(sorted(choices))
            names[name][field] = rng.choice(choices[field])
            done = f"{name}.{field} = {names[name][field]}"
        else:
            names, done = mutate.tree(rng, names)
        data = json.dumps(names).encode()
        new = struct.pack("<Q", len(data)) + data + body
    replace(path, new)
    if what > 0.97:
        path.unlink()
        os.mkfifo(path)
        done = "the weights are a pipe"
    return _case(done, base, folder)


def index(rng: random.Random, base: Base, folder: Path) -> Case:
    """model.safetensors.index.json: names of tensors, and of files."""
    path = linked(base.checkpoint(), folder / "checkpoint") / "model.safetensors.index.json"
    whole = json.loads(path.read_text())
    what, same = rng.random(), False
    if what < 0.1:
        data, done, same = mutate.same(rng, whole).encode(), "the same, written otherwise", True
    elif what < 0.3:
        data, done = mutate.text(rng, path.read_bytes())
    elif what < 0.6:
        name, file = (
            rng.choice(sorted(whole["weight_map"])),
            rng.choice(
                [
                    "",
                    ".",
                    "..",
                    "../tiny/model-00001.safetensors",
                    "/etc/passwd",
                    "/dev/zero",
                    "config.json",
                    "missing.safetensors",
                    "model-00001.safetensors/",
                    "./model-00001.safetensors",
                    "a\x00b",
                    "x" * 5000,
                    "tokenizer.json",
                    "a\nb",
                ]
            ),
        )
        for one in whole["weight_map"] if what < 0.4 else [name]:
            whole["weight_map"][one] = file
        data, done = json.dumps(whole).encode(), f"{name} in {file[:40]!r}"
    else:
        whole, done = mutate.tree(rng, whole)
        data = json.dumps(whole).encode()
    replace(path, data)
    if what > 0.95:
        path.unlink()
        os.mkfifo(path)
        done = "the index is a pipe"
    return _case(done, base, folder, same=same)
