"""YAML that every reader takes alike, and the file it goes into."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import MissingRequirementError, OutputError
from ..extras import pip_install
from ..words import visible

# 1e3 and y: text for PyYAML, a number and true for others.
_NOT_TEXT_FOR_ALL = re.compile(r"[-+.]*[0-9][0-9a-fA-FxXoO_.,:+-]*|[yYnN]")


def write_yaml(documents: Sequence[Mapping[str, Any]], comment: str = "") -> str:
    """Documents one after the other, keys in their order, nothing by reference; `comment` stands before them.

    Values are mappings, lists, text, numbers, booleans and None. Raises MissingRequirementError without PyYAML.
    """
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise MissingRequirementError(f"Writing YAML needs {error.name}; run: {pip_install('deploy')}.") from None

    class Dumper(yaml.SafeDumper):
        """Lists stand deeper than their key, and a value that comes twice is written twice."""

        def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
            super().increase_indent(flow, False)

        def ignore_aliases(self, data: Any) -> bool:
            return True

    def text(dumper: Any, value: str) -> Any:
        style = "|" if "\n" in value else "'" if _NOT_TEXT_FOR_ALL.fullmatch(value) else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)

    Dumper.add_representer(str, text)
    head = "".join(f"# {visible(line)}".rstrip() + "\n" for line in comment.splitlines())
    return head + yaml.dump_all(documents, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=1000,
                                explicit_start=len(documents) > 1)


def save_text(text: str, out: Path, overwrite: bool = False) -> None:
    """Write a file in one step; an existing one is replaced only with `overwrite`. Raises OutputError."""
    if out.exists() and not overwrite:
        raise OutputError(f"{out} exists already; choose another --out or add --force.")
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(out)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise OutputError(f"{out} cannot be written: {error.strerror}.") from None
