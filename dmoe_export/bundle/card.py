"""README.md of a bundle: what a person, or a hub, reads first. Programs read the manifest and nothing of this.

It is not listed in the manifest, so editing it by hand does no harm. Two parts are kept up to date between marks: the
files (an engine may come later) and the result of the last check. Where somebody removed the marks, nothing is changed.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from ..guards.regular_file import read_regular
from .manifest import Manifest
from .writer import write_text

CARD_NAME = "README.md"
_MOST_BYTES = 16 << 20
Section = Literal["files", "check"]


def section(name: Section, body: str) -> str:
    """A part of a card between its marks."""
    return f"<!-- dmoe-export: {name} -->\n{body.strip()}\n<!-- dmoe-export: end of {name} -->\n"


def replaced(card: str, name: Section, body: str) -> str | None:
    """The card with a new body of a part; None where its marks are not there, once and in order."""
    pattern = rf"<!-- dmoe-export: {name} -->\n.*?<!-- dmoe-export: end of {name} -->\n"
    new, count = re.subn(pattern, lambda _: section(name, body), card.replace("\r\n", "\n"), flags=re.DOTALL)
    return new if count == 1 else None


def update(folder: Path, name: Section, body: str) -> str | None:
    """Replace a part of a bundle's card; a clause saying why it could not be, None where it was.

    A bundle without a card gets none (older bundles, and those fetched from a hub). A card that is a link becomes a
    file, and what it pointed to stays as it is.
    """
    path = folder / CARD_NAME
    if not path.exists():
        return None
    try:
        new = replaced(read_regular(path, _MOST_BYTES).decode("utf-8"), name, body)
        if new is None:
            return "its marks were removed"
        write_text(path, new)
    except UnicodeDecodeError:
        return "it is no text in UTF-8"
    except OSError as error:
        return error.strerror or str(error)
    return None


def cell(text: str) -> str:
    """Text as a cell of a table, or in a line: nothing in it means anything to Markdown or HTML."""
    plain = re.sub(r"([\\`*_\[\]|~$])", r"\\\1", " ".join(text.split()))
    return plain.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def files_table(manifest: Manifest) -> str:
    """The files of a bundle and their sizes in bytes."""
    rows = "".join(f"| {cell(entry.path)} | {entry.size:,} | {cell(_meaning(manifest, entry.path))} |\n"
                   for entry in manifest.files)
    total = sum(entry.size for entry in manifest.files)
    return (f"| file | bytes | content |\n|---|---:|---|\n{rows}\n{total:,} bytes in all. `manifest.json` has the "
            "sha256 of each.")


def _meaning(manifest: Manifest, path: str) -> str:
    graph = manifest.denoiser.file
    known = {graph: "the graph", f"{graph}.data": "dense weights"}
    if manifest.experts:
        known[manifest.experts.file] = "routed experts"
    if manifest.salient:
        known |= {entry.file: "graph of salient steps" for entry in manifest.salient.graphs}
    if manifest.tokenizer:
        known |= {manifest.tokenizer.file: "tokenizer"}
        if manifest.tokenizer.chat_template:
            known |= {manifest.tokenizer.chat_template: "chat template"}
    for engine in manifest.engines:
        graph = "engine of salient steps, " if engine.graph else "engine of "
        known[engine.file] = f"{graph}{engine.flavour} {engine.version} for {', '.join(engine.targets)}"
    return known.get(path, "")
