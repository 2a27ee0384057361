"""Hostile bundles: the manifest, files under a manifest that was made to fit, the graph."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import onnx

from .. import mutate
from ..case import Base, Case, answer, linked, replace, reseal

FILES = ("denoiser.onnx", "denoiser.onnx.data", "experts.bin", "tokenizer.json", "chat_template.jinja", "salient.onnx")


def _command(rng: random.Random, bundle: Path) -> list[str]:
    plan = ["build", str(bundle), "--dry-run", "--experts-op", "onnx", "--targets", "sm80"]
    budget = answer(bundle, "--expert-budget", "50%")
    salient = answer(bundle, "--salient-threshold", "0.9")
    return rng.choice(
        [
            answer(bundle),
            answer(bundle),
            answer(bundle, ids=None),
            ["inspect", str(bundle)],
            budget,
            salient,
            plan,
            answer(bundle, "--verify", "sizes"),
        ]
    )


def manifest(rng: random.Random, base: Base, folder: Path) -> Case:
    """manifest.json alone."""
    bundle = linked(base.bundle, folder / "bundle")
    path = bundle / "manifest.json"
    whole = json.loads(path.read_text())
    what = rng.random()
    if what < 0.1:
        replace(path, mutate.same(rng, whole))
        return Case("the same, written otherwise", [answer(bundle)], tokens=base.tokens)
    if what < 0.25:
        data, done = mutate.text(rng, path.read_bytes())
    elif what < 0.45:  # numbers that graph and experts have, too
        part, changed = rng.choice(["model", "routing", "experts", "denoiser"]), []
        whole[part], done = mutate.tree(rng, whole[part])
        data, done = json.dumps(whole).encode(), f"{part}: {done}{''.join(changed)}"
    else:
        whole, done = mutate.tree(rng, whole)
        data = json.dumps(whole).encode()
    replace(path, data)
    return Case(done, [_command(rng, bundle)])


def sealed(rng: random.Random, base: Base, folder: Path) -> Case:
    """Another file than the graph, changed, with a manifest that says so: content, size, kind, name."""
    bundle = linked(base.bundle, folder / "bundle")
    name = rng.choice([n for n in FILES if n != "denoiser.onnx" and (bundle / n).exists()])
    path, what = bundle / name, rng.random()
    if what < 0.45:
        data, done = mutate.raw(rng, path.read_bytes())
        replace(path, data)
    elif what < 0.6:
        size = len(path.read_bytes())
        data = rng.choice(
            [
                b"",
                b"\0" * size,
                b"\xff" * size,
                path.read_bytes()[: size // 2],
                path.read_bytes() * 2,
                b"\x00\x00\xc0\x7f" * (size // 4),
                b"\xff\xff\x7f\x7f" * (size // 4),
            ]
        )
        replace(path, data)
        done = f"{len(data)} bytes {data[:8]!r}…"
    elif what < 0.8:
        kind = rng.choice(["fifo", "folder", "link to /dev/zero", "link to itself", "link outside", "absent"])
        path.unlink()
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        elif kind != "absent":
            path.symlink_to(
                {"link to /dev/zero": "/dev/zero", "link to itself": path}.get(kind, base.folder / "tokens.json")
            )
        return Case(f"{name} is a {kind}", [_command(rng, bundle)], must_refuse=True)
    else:
        whole = json.loads((bundle / "manifest.json").read_text())
        other = rng.choice(
            [
                "../bundle/" + name,
                "/etc/passwd",
                "a/../" + name,
                "./" + name,
                name + "\x00",
                "",
                "manifest.json",
                "x\ny",
                "x" * 5000,
                "\ud800",
            ]
        )
        text = json.dumps(whole).replace(json.dumps(name), json.dumps(other))
        replace(bundle / "manifest.json", text)
        return Case(f"{name} is called {other[:30]!r}", [_command(rng, bundle)])
    reseal(bundle, name)
    return Case(f"{name}: {done}", [_command(rng, bundle)])


def damaged(rng: random.Random, base: Base, folder: Path) -> Case:
    """Any file changed, and the manifest does not say so: refused, whatever the change is."""
    bundle = linked(base.bundle, folder / "bundle")
    name = rng.choice([n for n in FILES if (bundle / n).exists()])
    old = (bundle / name).read_bytes()
    data, done = mutate.raw(rng, old)
    replace(bundle / name, data)
    command = rng.choice([answer(bundle), ["inspect", str(bundle)], answer(bundle, "--expert-budget", "50%")])
    return Case(f"{name}: {done}", [command], must_refuse=data != old)


def graph(rng: random.Random, base: Base, folder: Path) -> Case:
    """denoiser.onnx, changed as bytes or as a graph, with a manifest that says so."""
    bundle = linked(base.bundle, folder / "bundle")
    path = bundle / "denoiser.onnx"
    if rng.random() < 0.4:
        data, done = mutate.raw(rng, path.read_bytes())
    else:
        model = onnx.load(path, load_external_data=False)
        done = "; ".join(_edit(rng, model) for _ in range(rng.choice([1, 1, 2, 3])))
        data = model.SerializeToString()
    replace(path, data)
    reseal(bundle, "denoiser.onnx")
    return Case(done, [_command(rng, bundle)])


def _edit(rng: random.Random, model: onnx.ModelProto) -> str:
    graph, number = model.graph, rng.choice([0, -1, 1, 2, 7, 2**31, 2**62, -(2**63)])
    node, tensor = rng.choice(graph.node), rng.choice(graph.initializer)
    way = rng.choice(
        ["attribute", "external", "dims", "op", "input", "output", "value", "opset", "drop", "function", "type"]
    )
    if way == "attribute":
        owners = [n for f in model.functions for n in f.node if n.attribute] + [n for n in graph.node if n.attribute]
        owner = (
            rng.choice([n for n in owners if n.op_type.startswith("Dmoe")] or owners)
            if rng.random() < 0.5
            else rng.choice(owners)
        )
        attribute = rng.choice(owner.attribute)
        if attribute.ints:
            attribute.ints[rng.randrange(len(attribute.ints))] = number
        else:
            attribute.i, attribute.f = number, float(number)
        return f"{owner.op_type}.{attribute.name} = {number}"
    if way == "external" and tensor.external_data:
        entry = rng.choice(tensor.external_data)
        entry.value = rng.choice(
            [str(number), "../tiny/config.json", "/etc/passwd", "/dev/zero", "manifest.json", "x", "", "१"]
        )
        return f"{tensor.name}: {entry.key} = {entry.value}"
    if way == "dims" and tensor.dims:
        tensor.dims[rng.randrange(len(tensor.dims))] = number
        return f"{tensor.name}: dims {list(tensor.dims)}"
    if way == "op":
        old, node.op_type = (
            node.op_type,
            rng.choice(["DmoeExperts", "DmoeLinear", "Identity", "If", "Loop", "Reshape", "Nope", ""]),
        )
        return f"{old} became {node.op_type!r}"
    if way == "input" and node.input:
        node.input[rng.randrange(len(node.input))] = rng.choice(
            [rng.choice(graph.node).output[0], tensor.name, graph.input[0].name, "nowhere", ""]
        )
        return f"another input of {node.name}"
    if way == "output":
        node.output[0] = rng.choice([rng.choice(graph.node).output[0], graph.output[0].name, "logits", ""])
        return f"another output of {node.name}"
    if way == "value":
        one = rng.choice([*graph.input, *graph.output])
        shape = one.type.tensor_type.shape.dim
        if shape and rng.random() < 0.5:
            shape[rng.randrange(len(shape))].dim_value = number
        elif rng.random() < 0.5:
            one.type.tensor_type.elem_type = rng.choice([1, 7, 8, 10, 0, 99])
        else:
            one.name = rng.choice(["", "logits", "input_ids", one.name + "x"])
        return f"another {one.name!r}"
    if way == "opset":
        rng.choice(model.opset_import).version = number
        return f"opset {number}"
    if way == "drop":
        graph.node.remove(node)
        return f"no {node.op_type}"
    if way == "function" and model.functions:
        function = rng.choice(model.functions)
        if rng.random() < 0.5:
            function.node.remove(rng.choice(function.node))
        else:
            one = rng.choice(function.node)
            one.op_type, one.domain = function.name, function.domain
        return f"another body of {function.name}"
    tensor.data_type = rng.choice([1, 2, 6, 7, 8, 10, 11, 16, 0, 99])
    return f"{tensor.name} of type {tensor.data_type}"
