"""Find or fetch ONNX Runtime's C and C++ headers, and print their folder.

    python plugins/onnxruntime/headers.py

Standard library only. The wheels of ONNX Runtime carry no headers; Debian's package libonnxruntime-dev does (85 kB).
Looked at in turn: the folder in ONNXRUNTIME_INCLUDE, installed headers, what was fetched before, the package of this
Debian or Ubuntu, the package of Debian trixie. Nothing is installed: the package is unpacked under build/onnxruntime.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

HEADER, PACKAGE, RELEASE = "onnxruntime_cxx_api.h", "libonnxruntime-dev", "trixie"
WORK = Path(__file__).resolve().parents[2] / "build" / "onnxruntime"
FOLDERS = ("/usr/include/onnxruntime", "/usr/local/include/onnxruntime", "/usr/include/onnxruntime/core/session",
           "/usr/local/include/onnxruntime/core/session", "/opt/onnxruntime/include")
KEYS = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
LEAST_API = 18  # common.h says what of it is used
INSTEAD = ("install ONNX Runtime's headers, or unpack the include folder of an ONNX Runtime release, and name their "
           "folder in ONNXRUNTIME_INCLUDE.")


class HeadersError(Exception):
    """No headers; one sentence."""


def onnxruntime_headers(work: Path = WORK) -> Path:
    """The folder of onnxruntime_cxx_api.h; fetches into `work` if need be. Raises HeadersError."""
    named = os.environ.get("ONNXRUNTIME_INCLUDE")
    if named:
        if not _usable(Path(named)):
            raise HeadersError(f"ONNXRUNTIME_INCLUDE={named} has no {HEADER} of API version {LEAST_API} or later.")
        return Path(named)
    for folder in map(Path, FOLDERS):
        if _usable(folder):
            return folder
    if found := _fetched(work):
        return found
    for program in ("apt-get", "dpkg-deb"):
        if not shutil.which(program):
            raise HeadersError(f"No ONNX Runtime headers are installed, nor {program} to fetch them; {INSTEAD}")
    for fetch in (_fetch_native, _fetch_from_release):
        fetch(work)
        if found := _fetched(work):
            return found
    raise HeadersError(f"The package {PACKAGE} could not be fetched with apt-get; {INSTEAD}")


def _usable(folder: Path) -> bool:
    """Both headers are there and new enough."""
    c_header = folder / "onnxruntime_c_api.h"
    if not ((folder / HEADER).is_file() and c_header.is_file()):
        return False
    version = re.search(r"#define ORT_API_VERSION (\d+)", c_header.read_text(encoding="utf-8", errors="replace"))
    return version is not None and int(version[1]) >= LEAST_API


def _fetched(work: Path) -> Path | None:
    return next((path.parent for path in sorted(work.rglob(HEADER)) if _usable(path.parent)), None)


def _fetch_native(work: Path) -> None:
    """From the package sources of this machine."""
    _download(work, [])


def _fetch_from_release(work: Path) -> None:
    """From Debian trixie, on the mirror this Debian uses, with package lists of our own."""
    bases = dict.fromkeys(re.findall(r"'(\S+)/dists/[a-z]+/InRelease'", _apt("--print-uris", "update")))
    if not bases or not KEYS.is_file():
        return
    state = work / "apt"
    for folder in ("lists/partial", "archives/partial"):
        (state / folder).mkdir(parents=True, exist_ok=True)
    (state / "status").touch()
    # Other people's sources are among them; they have no such release signed with Debian's keys and are passed over.
    (state / "sources.list").write_text("".join(f"deb [signed-by={KEYS}] {base} {RELEASE} main\n" for base in bases))
    options = [f"-oDir::State={state}", f"-oDir::State::Lists={state}/lists", f"-oDir::State::status={state}/status",
               f"-oDir::Cache={state}", f"-oDir::Etc::SourceList={state}/sources.list", "-oDir::Etc::SourceParts=-"]
    _apt(*options, "update")
    _download(work, options)
    shutil.rmtree(state)  # 40 MB of lists


def _download(work: Path, options: list[str]) -> None:
    """Download and unpack the package; leaves nothing new when that fails."""
    work.mkdir(parents=True, exist_ok=True)
    _apt(*options, "download", PACKAGE, folder=work)
    for package in work.glob(f"{PACKAGE}_*.deb"):
        partial, done = work / "partial", work / package.stem
        for folder in (partial, done):
            shutil.rmtree(folder, ignore_errors=True)
        subprocess.run(["dpkg-deb", "-x", package, partial], check=False)
        if partial.is_dir():
            partial.replace(done)
        package.unlink()


def _apt(*arguments: str, folder: Path | None = None) -> str:
    """What apt-get prints; a failure prints nothing, the callers look at what is there afterwards."""
    return subprocess.run(["apt-get", "-q", *arguments], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                          stdin=subprocess.DEVNULL, text=True, check=False).stdout


if __name__ == "__main__":
    try:
        print(onnxruntime_headers())
    except HeadersError as problem:
        sys.exit(f"[ort-ops] {problem}")
