"""What Kubernetes takes as a name: told before a manifest is written, not when a cluster refuses it."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import RequestError
from ..text.messages import short

_LABEL = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
_RULES = {  # what the name is of: (pattern, in words)
    "service": (r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?",
                "1 to 63 lower-case letters, digits and hyphens, a letter first and no hyphen last"),
    "label": (_LABEL, "1 to 63 lower-case letters, digits and hyphens, no hyphen first or last"),
    "object": (rf"(?=.{{1,253}}$){_LABEL}(\.{_LABEL})*",
               "lower-case letters, digits, hyphens and dots, at most 253"),
    "host": (r"(?=.{1,253}$)[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*",
             "a host's name without a port, such as models.example.org"),
    "image": (r"(?=.{1,500}$)[A-Za-z0-9][\w.:@/-]*", "an image's name, such as registry.example.org/dmoe-export:0.1.0"),
    "folder": (r"(?!(.*/)?\.{1,2}(/|$))[^/\x00-\x1f\x7f]+(/[^/\x00-\x1f\x7f]+)*",
               "a folder inside the volume, such as models/mini.bundle"),
}


def check_name(option: str, value: str, kind: str) -> str:
    """The value, if it is one; `kind`: service, label, object, host, image or folder. Raises RequestError."""
    pattern, words = _RULES[kind]
    if not re.fullmatch(pattern, value, re.ASCII) or not value.isprintable():
        raise RequestError(f"{option} {short(value)} is no name that Kubernetes takes: it must be {words}.")
    return value


def name_of(bundle: Path) -> str:
    """A Service's name from a bundle's: llada2-0-mini of LLaDA2.0-mini.bundle; raises RequestError if none is left."""
    made = re.sub(r"[^a-z0-9]+", "-", bundle.name.removesuffix(".bundle").lower()).strip("-")[:63].rstrip("-")
    if not re.fullmatch(_RULES["service"][0], made):
        raise RequestError(f"Bundle {short(bundle.name)} gives no name for a Service; choose one with --name.")
    return made
