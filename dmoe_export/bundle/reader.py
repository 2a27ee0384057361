"""Opening a bundle: the manifest is read, its version known, every file verified before use."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from pydantic import ValidationError

from ..errors import BundleError, RequestError
from .manifest import MANIFEST_NAME, SCHEMA_VERSION, FileEntry, Manifest

Verify = Literal["full", "sizes"]
_BLOCK = 4 << 20


@dataclass(frozen=True)
class Bundle:
    """A verified bundle."""

    folder: Path
    manifest: Manifest

    @property
    def denoiser_path(self) -> Path:
        """The ONNX graph."""
        return self.folder / self.manifest.denoiser.file


def open_bundle(folder: str | Path, verify: Verify = "full", progress: Callable[[int], None] | None = None) -> Bundle:
    """Read and verify a bundle.

    `verify`: "full" compares size and sha256 of every file, "sizes" only the sizes (for bundles of many gigabytes
    that were verified before). `progress` is told the bytes hashed. Raises BundleError, one sentence per failure,
    and RequestError for another `verify`.
    """
    if verify not in get_args(Verify):
        raise RequestError(f"verify is {verify!r}, it must be {' or '.join(get_args(Verify))}.")
    folder = Path(folder)
    manifest = read_manifest(folder)
    for entry in manifest.files:
        _verify_file(folder, entry, verify, progress)
    return Bundle(folder, manifest)


def read_manifest(folder: Path) -> Manifest:
    """The manifest alone, schema checked, files not."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        what = ("has no manifest.json" if folder.is_dir() else "is a file, not a folder" if folder.exists()
                else "does not exist")
        raise BundleError(f"{folder} is no bundle: it {what}; make one with: "
                          "dmoe-export export CHECKPOINT --out BUNDLE.")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        version = raw["schema_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{path} is not readable as a manifest ({error!r}); export the bundle again.") from None
    if version != SCHEMA_VERSION:
        raise BundleError(f"{path} has schema version {version!r}, this program reads {SCHEMA_VERSION}; "
                          "export again, or use the version of dmoe-export that made it.")
    try:
        manifest = Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "its numbers"
        raise BundleError(f"{path} contradicts schema version {version} at {where}: {first['msg']}.") from None
    listed = {entry.path for entry in manifest.files}
    needed = [manifest.denoiser.file, f"{manifest.denoiser.file}.data"]
    needed += [manifest.experts.file] if manifest.experts else []
    if manifest.salient:
        needed += [graph.file for graph in manifest.salient.graphs]
    if manifest.tokenizer:
        needed += [f for f in (manifest.tokenizer.file, manifest.tokenizer.chat_template) if f]
    for engine in manifest.engines:
        needed += [engine.file, *(weight.file for weight in engine.weight_inputs)]
    for name in needed:
        if name not in listed:
            raise BundleError(f"{path} uses {name} but does not list it under files.")
    return manifest


def _verify_file(folder: Path, entry: FileEntry, verify: Verify, progress: Callable[[int], None] | None) -> None:
    path = folder / entry.path
    try:
        size = path.stat().st_size
        if size != entry.size:
            raise BundleError(f"{path} has {size} bytes, the manifest says {entry.size}; copy the bundle again.")
        if verify == "full" and hash_file(path, progress) != entry.sha256:
            raise BundleError(f"{path} was changed: its sha256 is not the manifest's; copy or export the bundle again.")
    except OSError as error:
        raise BundleError(f"{path} cannot be read ({error.strerror}); copy the bundle again.") from None


def hash_file(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    buffer = bytearray(_BLOCK)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
            if progress:
                progress(count)
    return digest.hexdigest()
