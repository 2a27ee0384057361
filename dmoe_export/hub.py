"""Hugging Face hub ids as arguments: `org/name` where no such folder is; files go into the hub cache, resumable.

The cache shows a repository as a folder of links (`snapshots/<commit>/…` into `blobs/`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from .errors import MissingRequirementError
from .extras import pip_install

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class HubError(Exception):
    """Why files could not be fetched, in the hub library's own words, as a sentence."""


def hub_id(source: str | Path) -> str | None:
    """The hub id that an argument is; None where it is, or is meant to be, a place on this machine."""
    path = Path(source)
    if path.exists() or not _HUB_ID.fullmatch(str(source)) or path.parent.is_dir():
        return None
    return str(source)


def blobs_of(folder: Path) -> Path | None:
    """Where the hub's cache keeps the files of a snapshot's folder; None of any other folder.

    The place need not exist: where a system has no links, files lie in the snapshot itself.
    """
    home = folder.resolve()
    repository = home.parent.parent
    blobs = repository / "blobs"
    ours = home.parent.name == "snapshots" and (blobs.is_dir() or repository.name.startswith("models--"))
    return blobs if ours else None


def fetch(name: str, patterns: Sequence[str], revision: str | None = None) -> Path:
    """Fetch a repository's files that match (fnmatch: `*` takes `/`, too) → the snapshot's folder, named by its commit.

    Raises MissingRequirementError without huggingface_hub, HubError for everything else.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise MissingRequirementError(f"{name} is no local folder, and fetching it from the hub needs huggingface_hub; "
                                      f"run: {pip_install('hub')}.") from error
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:  # huggingface_hub raises many kinds; each means the same to the user
        reason = str(error).splitlines()[0].rstrip(". ") if str(error) else type(error).__name__
        raise HubError(f"{reason}.") from error
