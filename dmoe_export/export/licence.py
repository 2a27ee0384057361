"""The licence of a checkpoint as its folder states it: front matter of README.md, and files of its text; no guess."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..bundle.writer import BundleWriter
from ..checkpoint.links import leaves
from ..guards.regular_file import MOST_CONFIG, read_regular

_FILE = re.compile(r"(LICEN[SC]E|NOTICE|COPYING)([.-].*)?", re.IGNORECASE)


@dataclass(frozen=True)
class Licence:
    """What a checkpoint says of its licence; None and empty where it says nothing."""

    identifier: str | None = None  # the hub's, such as apache-2.0 or other
    name: str | None = None
    link: str | None = None
    files: tuple[str, ...] = ()  # names of the texts, which the bundle holds, too
    unread: bool = False  # README.md has front matter that is no YAML
    left_out: tuple[str, ...] = ()  # names of texts that are links to elsewhere: a bundle may be published

    @property
    def fields(self) -> dict[str, str]:
        """For a card's front matter. A text without an identifier is `other`, nothing at all is `unknown`."""
        texts = [name for name in self.files if not name.upper().startswith("NOTICE")]
        found = {"license": self.identifier or ("other" if texts else "unknown")}
        if self.name:
            found["license_name"] = self.name
        link = self.link or (texts[0] if texts and found["license"] == "other" else None)
        return found | ({"license_link": link} if link else {})

    @property
    def warnings(self) -> list[str]:
        """What the bundle does not hold."""
        return [f"{name} of the checkpoint is a link that leaves its folder, so it was not copied; put the text itself "
                "there if it belongs to the bundle." for name in self.left_out]

    @property
    def in_words(self) -> str:
        """One sentence."""
        says = " ".join(filter(None, (self.identifier, f"({self.name})" if self.name else None)))
        texts = f"; its text: {', '.join(self.files)}" if self.files else ""
        if says:
            return f"the checkpoint's README.md says {says}{texts}"
        none = "the front matter of its README.md cannot be read" if self.unread else "the checkpoint names none"
        return none + texts if texts else f"not known: {none}"


def copy_licence(folder: Path, writer: BundleWriter) -> Licence:
    """Copy a checkpoint's licence texts into the bundle, and read what its README.md says."""
    # A generated checkpoint has no folder.
    found = sorted(path.name for path in folder.glob("*") if _FILE.fullmatch(path.name) and path.is_file())
    names = tuple(name for name in found if not leaves(folder / name, folder))
    elsewhere = tuple(name for name in found if name not in names)
    for name in names:
        shutil.copyfile(folder / name, writer.folder / name)
        writer.add_file(name)
    said = front_matter(folder / "README.md")
    if said is None:
        return Licence(files=names, unread=True, left_out=elsewhere)
    return Licence(_text(said.get("license")), _text(said.get("license_name")),
                   _link(_text(said.get("license_link")), names), names, left_out=elsewhere)


def front_matter(path: Path) -> dict[str, Any] | None:
    """The YAML block at the head of a card; empty where there is none, None where it cannot be read."""
    if not path.is_file():
        return {}
    try:
        text = read_regular(path, MOST_CONFIG).decode("utf-8-sig")
    except (OSError, ValueError):
        return None
    found = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", text, re.DOTALL)
    if not found:
        return {}
    import yaml

    try:
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(found[1])):
            return None  # a few of them can stand for any size
        said = yaml.safe_load(found[1])
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
    return said if isinstance(said, dict) else None


def _text(value: object) -> str | None:
    """One line of text, of a text or a list of one."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return " ".join(value.split()) or None if isinstance(value, str) else None


def _link(link: str | None, copied: tuple[str, ...]) -> str | None:
    """A link to elsewhere, or to a file that is here."""
    if link is None or re.match(r"https?://", link):
        return link
    return link if link in copied else None
