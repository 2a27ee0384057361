"""A bundle argument is a folder, or the hub id (`org/name`) of one: its manifest is fetched, then what that lists."""

from __future__ import annotations

import glob
from pathlib import Path

from ..errors import BundleError, RequestError
from ..hub import HubError, fetch, hub_id
from .manifest import MANIFEST_NAME
from .reader import read_manifest
from .seal import SIGNATURE_NAME


def resolve_bundle(source: str | Path) -> Path:
    """The local folder of a bundle, whole but not yet verified; of a hub id one of links, in the hub's cache.

    Raises RequestError for what is no path, BundleError for a repository that is no bundle or cannot be fetched,
    MissingRequirementError without huggingface_hub. A path is returned as it is: opening it says what is wrong with it.
    """
    if not isinstance(source, (str, Path)):
        raise RequestError(f"The bundle {source!r} is no path; give a folder or a hub id.")
    name = hub_id(source)
    if name is None:
        return Path(source)
    folder = fetched_bundle(name)
    if folder is None:
        raise BundleError(f"{name} on the hub has no {MANIFEST_NAME}, so it is no bundle; if it is a checkpoint, make "
                          f"a bundle of it with: dmoe-export export {name} --out BUNDLE.")
    return folder


def fetched_bundle(name: str) -> Path | None:
    """The bundle of a hub id, fetched; None when the repository holds none. Errors as in `resolve_bundle`."""
    try:
        folder = fetch(name, [MANIFEST_NAME])
        if not (folder / MANIFEST_NAME).is_file():
            return None
        listed = [glob.escape(entry.path) for entry in read_manifest(folder).files]
        # The same commit for all: the snapshot's folder is named by it.
        return fetch(name, [MANIFEST_NAME, SIGNATURE_NAME, *listed], revision=folder.name)
    except HubError as error:
        raise BundleError(f"{name} is no local bundle and could not be fetched from the hub: {error} "
                          "Run again to resume.") from error
