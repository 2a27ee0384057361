"""Opening a bundle: the manifest is read, its version known, every file verified before use."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import ValidationError

from ..errors import BundleError, RequestError
from ..guards.regular_file import read_regular
from ..hub import blobs_of
from .finite import not_finite
from .manifest import MANIFEST_NAME, SCHEMA_VERSION, FileEntry, Manifest
from .seal import MOST_BYTES, check_seal, sha256_of

Verify = Literal["full", "sizes"]
_BLOCK = 4 << 20


@dataclass(frozen=True)
class Bundle:
    """A verified bundle."""

    folder: Path
    manifest: Manifest
    sha256: str | None = None  # of manifest.json as it was read: the bundle's seal; None of a manifest made in memory
    vouched: bool = True  # whether its engine files, which bring native code, may run: fetched ones need a seal

    @property
    def denoiser_path(self) -> Path:
        """The ONNX graph."""
        return self.folder / self.manifest.denoiser.file


def open_bundle(folder: str | Path, verify: Verify = "full", progress: Callable[[int], None] | None = None, *,
                expect_sha256: str | None = None, trusted_key: str | Path | None = None) -> Bundle:
    """Read and verify a bundle.

    `verify`: "full" compares size and sha256 of every file, "sizes" only the sizes (for bundles of many gigabytes
    that were verified before). `progress` is told the bytes hashed. `expect_sha256`, `trusted_key`: the manifest must
    have this sha256, and be signed by this key (a PEM file; `bundle/seal.py`); both need verify full. Raises
    BundleError, one sentence per failure, RequestError for another `verify` or what is no sha256 or key,
    MissingRequirementError where no signature can be verified.
    """
    if not isinstance(verify, str) or verify not in get_args(Verify):
        raise RequestError(f"verify is {verify!r}, it must be {' or '.join(get_args(Verify))}.")
    if verify != "full" and (expect_sha256 is not None or trusted_key is not None):
        raise RequestError("An expected sha256 or a trusted key says nothing of a bundle's files with verify "
                           f"{verify}; use verify full.")
    folder = Path(folder)
    content = _manifest_bytes(folder)  # read once: what is sealed is what is parsed
    check_seal(folder, content, expect_sha256, trusted_key)
    manifest = _manifest(folder, content)
    for entry in manifest.files:
        _verify_file(folder, entry, verify, progress)
    sealed = expect_sha256 is not None or trusted_key is not None
    return Bundle(folder, manifest, sha256_of(content), vouched=sealed or blobs_of(folder) is None)


def check_unchanged(bundle: Bundle) -> None:
    """Raise BundleError where other files have taken an open bundle's place: who opens one late must not mix two.

    By the manifest; an engine that was added meanwhile changes nothing.
    """
    engines = {engine.file for engine in bundle.manifest.engines}
    now = {entry.path: entry for entry in read_manifest(bundle.folder).files}
    if any(now.get(entry.path) != entry for entry in bundle.manifest.files if entry.path not in engines):
        raise BundleError(f"{bundle.folder} was changed or removed while it was in use; open the bundle again.")


def read_manifest(folder: Path) -> Manifest:
    """The manifest alone, schema checked, files not."""
    return _manifest(folder, _manifest_bytes(folder))


def _manifest(folder: Path, content: bytes) -> Manifest:
    path = folder / MANIFEST_NAME
    raw = _parsed(path, content)
    version = raw["schema_version"]
    if _is_older(version):
        raise BundleError(f"{path} has schema version {version}, this program reads {SCHEMA_VERSION}; export the "
                          "bundle again with: dmoe-export export CHECKPOINT --out BUNDLE.")
    if version != SCHEMA_VERSION:
        raise BundleError(f"{path} has schema version {version!r}, this program reads {SCHEMA_VERSION}; "
                          "use the version of dmoe-export that made it, or export again.")
    try:
        manifest = Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "its numbers"
        raise BundleError(f"{path} contradicts schema version {version} at {where}: "
                          f"{first['msg'].removeprefix('Value error, ')}.") from None
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


def check_is_bundle(folder: Path) -> None:
    """Raise BundleError unless a bundle is there, of this schema version or an older one, which may be replaced."""
    raw = _parsed(folder / MANIFEST_NAME, _manifest_bytes(folder))
    if not (_is_older(raw["schema_version"]) and str(raw.get("created_by")).startswith("dmoe-export ")):
        read_manifest(folder)


def _manifest_bytes(folder: Path) -> bytes:
    path = folder / MANIFEST_NAME
    if not path.exists() or not folder.is_dir():
        raise BundleError(f"{folder} is no bundle: it {_lacking(folder)}; make one with: "
                          "dmoe-export export CHECKPOINT --out BUNDLE.")
    try:
        return read_regular(path, MOST_BYTES)
    except OSError as error:
        raise BundleError(f"{path} is not readable as a manifest ({error.strerror}); export the bundle "
                          "again.") from None


def _parsed(path: Path, content: bytes) -> dict[str, Any]:
    """The manifest's fields, `schema_version` among them; no other field is checked."""
    try:
        raw: Any = json.loads(content.decode("utf-8"))
        wrong = not_finite(raw)
        json.dumps(raw, ensure_ascii=False).encode()  # half a character (a surrogate) is no text that could be shown
        if not isinstance(raw, dict) or "schema_version" not in raw:
            wrong = f"it has no schema_version, so it is none of {MANIFEST_NAME}"
    except ValueError as error:
        wrong = str(error).split(";")[0]  # the rest is advice for programmers
    except RecursionError:
        wrong = "it is nested too deep"
    if wrong:
        raise BundleError(f"{path} is not readable as a manifest ({wrong}); export the bundle again.")
    return dict(raw)


def _is_older(version: Any) -> bool:
    return isinstance(version, int) and 0 < version < SCHEMA_VERSION


def _lacking(folder: Path) -> str:
    """What keeps a folder from being a bundle, as the end of a sentence."""
    if folder.is_dir():
        path = folder / MANIFEST_NAME
        return (f"has a manifest.json that is a link to {os.path.realpath(path)}, where no file is" if path.is_symlink()
                else "has no manifest.json")
    if folder.exists():
        return "is a file, not a folder"
    if folder.is_symlink():
        return f"is a link to {os.path.realpath(folder)}, which does not exist"
    old = sorted(folder.absolute().parent.glob(f".{glob.escape(folder.name)}.partial-*.old"))
    return f"does not exist, but was being replaced when a crash came, and is now {old[-1]}" if old else (
        "does not exist")


def _verify_file(folder: Path, entry: FileEntry, verify: Verify, progress: Callable[[int], None] | None) -> None:
    path = folder / entry.path
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise BundleError(f"{path} is no regular file, and a bundle holds nothing else; copy the bundle again.")
        if found.st_size != entry.size:
            raise BundleError(f"{path} has {found.st_size} bytes, the manifest says {entry.size}; copy the bundle "
                              "again.")
        if verify == "full" and hash_file(path, progress) != entry.sha256:
            raise BundleError(f"{path} was changed: its sha256 is not the manifest's; copy or export the bundle again.")
    except OSError as error:
        if path.is_symlink() and not path.exists():
            raise BundleError(f"{path} is a link to {os.path.realpath(path)}, where no file is; fetch the bundle "
                              "again, or copy it with what its links point to (cp -rL).") from None
        raise BundleError(f"{path} cannot be read ({error.strerror}); make it readable, or copy the bundle "
                          "again.") from None


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
