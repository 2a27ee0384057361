"""What the fuzzer of `tests/fuzz` found, as the smallest input that shows it.

Each must be refused in one sentence, or answered.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
from fuzz.case import PROMPT, Base, Case, answer, linked, replace, reseal

Reproducer = Callable[[Base, Path], Case]


def _export(change: Callable[[Path], Any]) -> Reproducer:
    """`export` of a checkpoint with a change; `out/bundle` then answers a prompt."""

    def case(base: Base, folder: Path) -> Case:
        change(linked(base.checkpoint(), folder / "checkpoint"))
        out = folder / "out" / "bundle"
        return Case("", [["export", str(folder / "checkpoint"), "--out", str(out)], answer(out, ids=None)])

    return case


def _bundle(change: Callable[[Path], Any], *command: str) -> Reproducer:
    """A command on a bundle with a change; `generate` with a prompt, if none is given."""

    def case(base: Base, folder: Path) -> Case:
        bundle = linked(base.bundle, folder / "bundle")
        change(bundle)
        return Case("", [[command[0], str(bundle), *command[1:]] if command else answer(bundle, ids=None)])

    return case


def _open(path: Any = None, **options: Any) -> Reproducer:
    def case(base: Base, folder: Path) -> Case:
        from dmoe_export.generator import Generator

        return Case("", [], lambda: Generator.open(base.bundle if path is None else path, **options).generate([[5]]))

    return case


def _call(prompts: Any, **options: Any) -> Reproducer:
    def case(base: Base, folder: Path) -> Case:
        from dmoe_export.generator import Generator

        return Case(
            "", [], lambda: Generator.open(base.bundle, threads=1).generate(prompts, max_new_tokens=4, **options)
        )

    return case


def _json(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        whole = json.loads((folder / name).read_text())
        change(whole)
        replace(folder / name, json.dumps(whole))

    return changed


def _sealed(name: str, content: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        replace(folder / name, content((folder / name).read_bytes()))
        reseal(folder, name)

    return changed


def _pipe(name: str) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return changed


def _endless(name: str) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to("/dev/zero")

    return changed


def _called(name: str, other: str) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        text = (folder / "manifest.json").read_text()
        replace(folder / "manifest.json", text.replace(json.dumps(name), json.dumps(other)))

    return changed


def _dims(model: bytes) -> bytes:
    graph = onnx.ModelProto.FromString(model)
    next(t for t in graph.graph.initializer if t.dims and not t.external_data).dims[0] = 2**62
    return graph.SerializeToString()


def _loop(base: Base, folder: Path) -> Case:
    (folder / "loop").symlink_to(folder / "loop")
    return Case("", [["export", str(base.checkpoint()), "--out", str(folder / "loop")]])


_PLAN = ("build", "--dry-run", "--experts-op", "onnx", "--targets", "sm80")
_CHECKPOINT_FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
    "model.safetensors.index.json",
    "LICENSE",
)

REPRODUCERS: dict[str, Reproducer] = {
    **{f"{name} of a checkpoint is a pipe": _export(_pipe(name)) for name in _CHECKPOINT_FILES},
    **{f"{name} of a checkpoint leads to /dev/zero": _export(_endless(name)) for name in _CHECKPOINT_FILES},
    "an architecture with a NUL": _export(_json("config.json", lambda c: c.update(architectures=["x\0\x1b[31m"]))),
    "an architecture of two lines": _export(_json("config.json", lambda c: c.update(architectures=["x\ny"]))),
    "a template that ends in half a character": _export(
        lambda f: replace(f / "chat_template.jinja", "{{ '\\ud800' }}")
    ),
    "a graph that ends early, to be built": _bundle(_sealed("denoiser.onnx", lambda b: b[:-100]), *_PLAN),
    "a graph that ends early": _bundle(_sealed("denoiser.onnx", lambda b: b[:-100])),
    "a graph with a byte too many": _bundle(_sealed("denoiser.onnx", lambda b: b + b"\xff")),
    "an empty graph": _bundle(_sealed("denoiser.onnx", lambda b: b"")),
    "a tensor of 2^62 rows": _bundle(_sealed("denoiser.onnx", _dims)),
    "weights cut in half": _bundle(_sealed("denoiser.onnx.data", lambda b: b[: len(b) // 2])),
    "no weights": _bundle(_sealed("denoiser.onnx.data", lambda b: b"")),
    **{
        f"a file of a bundle called {name!r}": _bundle(_called("chat_template.jinja", name))
        for name in ("\ud800", "a\nb", "a\0b", "\x1b[2J", "x" * 5000)
    },
    "half a character in a manifest": _bundle(
        _json("manifest.json", lambda m: m.update(created_by="\ud800")), "inspect"
    ),
    "experts called with a NUL, to be built": _bundle(_called("experts.bin", "experts.bin\0"), *_PLAN),
    "a template that makes two megabytes": _bundle(_sealed("chat_template.jinja", lambda b: b"{{ 'a,' * 1000000 }}")),
    "output to a link to itself": _loop,
    "a trusted key that is no path": _open(trusted_key={1}),
    "a bundle that is no path": _open(3),
    "ids that are none": _call([[5, None, "3"]]),
    "ids beyond 64 bits": _call([[2**70]]),
    "a role that is no text": _call([[{"role": None, "content": PROMPT}]]),
}
