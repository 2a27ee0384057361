"""What ONNX Runtime says of a graph that it refuses, as an error of ours: at fault is the bundle, or this machine."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import BundleError, DmoeError, MissingRequirementError
from ..ops.schema import OPSET
from .ort import ort

# Every graph of this package loads in this version or a later one, so what these refuse is no such graph.
_TESTED = 1, 31
# What it says of a graph that is newer than it is; nothing else is mended by a newer version.
_TOO_NEW = re.compile(r"not a registered function|No Op registered|No opset import|under development|NOT_IMPLEMENTED|"
                      r"Could not find an implementation|IR version|IR_VERSION|Unrecognized attribute")
_NO_KERNEL = re.compile(r"NOT_IMPLEMENTED|Could not find an implementation")
_NO_MEMORY = re.compile(r"bad_alloc|allocate memory|out of memory|Failed to allocate")

# What it says of weights behind a link, and the versions that follow no link at all.
_ELSEWHERE, _FILE = re.compile(r"escapes (both )?model directory"), re.compile(r'External data path: "([^"]*)"')
_NO_LINKS = re.compile(r"1\.24\.[0-3]$")

_LONGEST = 400  # characters of what others said


def not_loaded(error: Exception, name: str, folder: Path | None, opset: int, package: str = "onnxruntime",
               on: str = "") -> DmoeError:
    """For a graph that could not be opened. `name`: the graph, in words; `folder`: where its data files lie, unless
    they are named by their real places. `opset`: as the manifest has it. `on`: " on PROVIDER".
    """
    said, reason = str(error), reason_of(error)
    if _ELSEWHERE.search(said):
        named = _FILE.search(said)
        file = named[1] if named else "a data file"
        if folder is None or named is None or (folder / file).is_symlink():
            advice = ("upgrade with: pip install -U " + package if _NO_LINKS.match(ort.__version__) else
                      "copy the bundle with the files in place of links, with: cp -rL BUNDLE COPY")
            return MissingRequirementError(f"ONNX Runtime {ort.__version__} cannot load {name}{on}: {file} is a link "
                                           f"to another folder than the graph's own; {advice}.")
    if isinstance(error, MemoryError) or _NO_MEMORY.search(said):
        return MissingRequirementError(f"There is not enough memory to open {name} ({reason}); free memory, or choose "
                                       "a smaller bundle.")
    if _TOO_NEW.search(said) and _may_be_newer(opset, package, said):
        return MissingRequirementError(f"ONNX Runtime {ort.__version__} cannot load {name}{on}: {reason}; upgrade "
                                       f"with: pip install -U {package}.")
    return BundleError(f"{name} is no ONNX model that fits its manifest ({reason}); copy or export the bundle again.")


def not_run(error: Exception, name: str) -> DmoeError:
    """For a graph that was opened and fails while it runs."""
    reason = reason_of(error)
    if isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)):
        return MissingRequirementError(f"There is not enough memory to run {name} ({reason}); free memory, or ask for "
                                       "shorter prompts and answers.")
    return BundleError(f"{name} fails when it runs, so it is not the graph of its manifest ({reason}); copy or export "
                       "the bundle again.")


def reason_of(error: Exception) -> str:
    """The first line of what a library said, as part of a sentence: printable, and not without end."""
    text = (str(error).splitlines() or [type(error).__name__])[0].strip().rstrip(".")
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    printable = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
    return printable if len(printable) <= _LONGEST else f"{printable[:_LONGEST]}…"


def _may_be_newer(opset: int, package: str, said: str) -> bool:
    """Whether a graph is newer than ONNX Runtime, and not a damaged one that only looks so."""
    version = tuple(int(part) for part in ort.__version__.split(".")[:2])
    # The provider for GPUs lacks kernels that the CPU's has, in every version.
    return version < _TESTED or opset > OPSET or (package != "onnxruntime" and bool(_NO_KERNEL.search(said)))
