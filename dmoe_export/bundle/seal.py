"""The seal of a bundle: the sha256 of its manifest, and a signature over it (docs/bundle.md, "Seal").

The manifest holds the sha256 of every file, so who trusts its bytes trusts the bundle.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
from pathlib import Path
from typing import Any

from ..errors import BundleError, MissingRequirementError, RequestError
from ..extras import pip_install
from ..guards.regular_file import read_regular
from .manifest import MANIFEST_NAME

SIGNATURE_NAME = f"{MANIFEST_NAME}.sig"
MOST_BYTES = 16 << 20  # of a manifest; those of the largest published models have under 1 MiB
_SIGNATURE_BYTES, _MOST_KEY_BYTES = 64, 64 << 10


def sha256_of(manifest: bytes) -> str:
    """The seal of a manifest's bytes, in hexadecimal."""
    return hashlib.sha256(manifest).hexdigest()


def manifest_sha256(folder: str | Path) -> str:
    """The seal of a bundle: sha256 of its manifest.json, in hexadecimal. Raises BundleError."""
    path = Path(folder) / MANIFEST_NAME
    try:
        return sha256_of(read_regular(path, MOST_BYTES))
    except OSError as error:
        raise BundleError(f"{path} cannot be read ({error.strerror}); name the folder of a bundle.") from None


def check_seal(folder: Path, manifest: bytes, expect_sha256: str | None, trusted_key: str | Path | None) -> None:
    """Raise BundleError unless a manifest's bytes are the expected ones, and signed with the trusted key.

    None asks for nothing. Raises RequestError for what is no sha256 or no key, MissingRequirementError without the
    library that verifies signatures.
    """
    if expect_sha256 is not None:
        if not isinstance(expect_sha256, str) or not re.fullmatch("[0-9a-fA-F]{64}", expect_sha256):
            raise RequestError(f"The expected sha256 {expect_sha256!r} is none; give the 64 hexadecimal digits that "
                               "export and inspect print.")
        if (found := sha256_of(manifest)) != expect_sha256.lower():
            raise BundleError(f"{folder / MANIFEST_NAME} has sha256 {found}, not the expected {expect_sha256.lower()}; "
                              "fetch the bundle again from who told you the sha256.")
    if trusted_key is not None:
        if not isinstance(trusted_key, (str, Path)):
            raise RequestError(f"The trusted key {trusted_key!r} is no path; give the file of a public key.")
        _check_signature(folder, manifest, Path(trusted_key))


def _check_signature(folder: Path, manifest: bytes, key_file: Path) -> None:
    try:
        from cryptography.exceptions import InvalidSignature
    except ImportError as error:
        raise MissingRequirementError(f"A trusted key needs {error.name or 'cryptography'}; run: "
                                      f"{pip_install('sign')}.") from error
    key, path = _public_key(key_file), folder / SIGNATURE_NAME
    try:
        signature = _signature(read_regular(path, _MOST_KEY_BYTES))
    except FileNotFoundError:
        raise BundleError(f"{folder} is not signed: it has no {SIGNATURE_NAME}; get it from who made the bundle, or "
                          "leave the trusted key out.") from None
    except OSError as error:
        raise BundleError(f"{path} cannot be read ({error.strerror}); copy the bundle again.") from None
    try:
        key.verify(signature, manifest)
    except InvalidSignature:
        raise BundleError(f"{path} is no signature of this {MANIFEST_NAME} by the key of {key_file}: bundle or key are "
                          "others, or an engine was added after signing; sign the bundle again if it is "
                          "yours.") from None


def _signature(content: bytes) -> bytes:
    """Of a file of 64 raw bytes, or of these in base64; what is neither verifies nothing."""
    if len(content) == _SIGNATURE_BYTES:
        return content
    try:
        return base64.b64decode(b"".join(content.split()), validate=True)
    except binascii.Error:
        return b""


def _public_key(path: Path) -> Any:
    """An Ed25519 public key from PEM, as openssl writes it."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    advice = f"make one with: openssl pkey -in PRIVATE -pubout -out {os.fspath(path)}"
    try:
        key = load_pem_public_key(read_regular(path, _MOST_KEY_BYTES))
    except OSError as error:
        raise RequestError(f"The trusted key {path} cannot be read ({error.strerror}); {advice}.") from None
    except Exception:  # cryptography raises its own kinds beside ValueError
        raise RequestError(f"The trusted key {path} is no public key in PEM; {advice}.") from None
    if not isinstance(key, Ed25519PublicKey):
        raise RequestError(f"The trusted key {path} is of another kind than Ed25519; {advice}, of a private key by: "
                           "openssl genpkey -algorithm ed25519.")
    return key
