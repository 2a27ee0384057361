"""What one hostile input is, and the pristine files it is made from."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NoReturn

from .shortcut import traces_shared

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "samples" / "tiny-dmoe"
PROMPT = "what is 2 plus 3?"
IDS = "40,41,42,43"
TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@dataclass
class Case:
    """A hostile input: commands run one after the other as long as they end with 0, or one call of the Python face."""

    done: str  # what was changed, for people
    commands: list[list[str]]
    call: Callable[[], Any] | None = None
    tokens: list[int] | None = None  # the only right answer of the last command, as nothing that matters was changed
    must_refuse: bool = False  # nothing may be answered: the manifest does not say what the files are


@dataclass(frozen=True)
class Base:
    """Pristine files, which no case changes, and what they answer."""

    folder: Path

    @property
    def bundle(self) -> Path:
        """Two layers, one with experts, and a salient graph."""
        return self.folder / "bundle"

    def checkpoint(self, family: str = "tiny") -> Path:
        """Of one of `FAMILIES`."""
        return self.folder / family

    @property
    def tokens(self) -> list[int]:
        """The bundle's answer to IDS."""
        return list(json.loads((self.folder / "tokens.json").read_text()))


class Draw(random.Random):
    """The random choices of case `number` of a target: the same in every run with a seed."""

    def __new__(cls, seed: int, target: str, number: int) -> Draw:
        return super().__new__(cls)

    def __init__(self, seed: int, target: str, number: int) -> None:
        super().__init__(f"{seed} {target} {number}")
        self.number = number


Make = Callable[[Draw, Base, Path], Case]
"""A target: writes a case's files into a folder."""

# Each with the names of its special tokens' fields, set to those of the sample's tokenizer.
FAMILIES = {
    "tiny": ("pad_token_id", "eos_token_id"),
    "llada-tiny": ("eos_token_id",),
    "dream-tiny": ("eos_token_id",),
    "llada-moe-tiny": ("eos_token_id",),
}


def answer(bundle: Path | str, *options: str, ids: str | None = IDS) -> list[str]:
    """The command that answers IDS, or the prompt, with a bundle."""
    what = ["--prompt-ids", ids] if ids else ["--prompt", PROMPT]
    return ["generate", str(bundle), *what, "--max-new-tokens", "4", "--threads", "1", "--json", *options]


def linked(source: Path, folder: Path) -> Path:
    """A folder with hard links to a folder's files: to change one, replace it."""
    folder.mkdir()
    for path in source.iterdir():
        os.link(path, folder / path.name)
    return folder


def replace(path: Path, content: bytes | str) -> None:
    """Write a file anew; what it was linked with stays."""
    path.unlink(missing_ok=True)
    path.write_bytes(content.encode(errors="surrogatepass") if isinstance(content, str) else content)


def reseal(bundle: Path, *names: str) -> None:
    """Have the manifest of a bundle say what these files are now."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    for entry in manifest["files"]:
        if entry["path"] in names:
            data = (bundle / entry["path"]).read_bytes()
            entry["size"], entry["sha256"] = len(data), sha256(data).hexdigest()
    replace(bundle / "manifest.json", json.dumps(manifest))


def pristine(folder: Path) -> Base:
    """Make the base, or take the one that these sources made before."""
    sources = sha256(b"".join(path.read_bytes() for path in sorted((ROOT / "dmoe_export").rglob("*.py"))))
    name = folder / f"base-{sources.hexdigest()[:12]}"
    if not name.is_dir():
        for old in folder.glob("base-*"):
            if time.time() - old.stat().st_mtime > 3600:  # a run beside this one may use it
                shutil.rmtree(old)
        unfinished = folder / "base-unfinished"
        process = os.fork()  # sessions and threads stay out of the process that forks all cases
        if process == 0:
            _in_child(unfinished)
        if os.waitpid(process, 0)[1]:
            raise SystemExit("The pristine bundle could not be made.")
        unfinished.rename(name)
    return Base(name)


def _in_child(folder: Path) -> NoReturn:
    try:
        _make(folder)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _make(folder: Path) -> None:
    from dmoe_export import export_checkpoint
    from dmoe_export.checkpoint.synthetic import GEOMETRIES, write_synthetic

    shutil.rmtree(folder, ignore_errors=True)
    for name, fields in FAMILIES.items():
        config = GEOMETRIES[name] | dict.fromkeys(fields, 1) | {"vocab_size": 164, "mask_token_id": 2}
        write_synthetic(folder / name, config)
        for file in TEXT_FILES:
            shutil.copy(SAMPLE / file, folder / name / file)
        (folder / name / "generation_config.json").write_text(
            json.dumps({"eos_token_id": [1], "max_new_tokens": 16, "do_sample": False, "temperature": 0.0})
        )
    with traces_shared(folder.parent / "traces", keep=True):
        export_checkpoint(folder / "tiny", folder / "bundle", salient=True)
    from dmoe_export.generator import Generator

    ids = [int(one) for one in IDS.split(",")]
    answered = Generator.open(folder / "bundle", threads=1).generate([ids], max_new_tokens=4)[0].token_ids
    (folder / "tokens.json").write_text(json.dumps(answered))
