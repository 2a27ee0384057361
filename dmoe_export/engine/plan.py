"""What an engine file says about itself, read from its bytes: no GPU, no TensorRT.

The layout is not documented by NVIDIA. It was read off files of TensorRT-RTX 1.7: a table of contents, then the plugin
libraries, the engine as tagged values, the weights. Anything that does not look like that is said to be unknown
(`UnknownLayoutError`), never guessed; only what contradicts the table of contents is called damaged.
"""

from __future__ import annotations

import mmap
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path

from ..ops.schema import PLUGIN_NAMESPACE
from .plugins import NAMES

Range = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Least, usual and largest shape of an input under a profile."""

DTYPES = {0: "float", 1: "float16", 2: "int8", 3: "int32", 4: "bool", 7: "bfloat16", 8: "int64"}
"""TensorRT's numbers of types, by the names that manifests use."""

_TARGETS = {0: "sm75", 1: "sm80", 2: "sm86", 3: "sm89", 4: "sm120", 5: "sm121"}  # bits; sm75: by elimination
_MAGIC, _TABLE, _LIBRARY, _ENGINE = b"vtrt", 64, b"NGLP", b"NGNE"
_INT, _LONGS = b"\x07\x80\x01\x00", b"\x01\x80\x09\x80\x01\x00"
_STRING = re.compile(rb"\x13\x80\x01\x00(.{8})\x01\x80\x0c\x80\x01\x00\1", re.DOTALL)
_DIMS = re.compile(_INT + b"(.{4})" + _LONGS + b"(.{8})", re.DOTALL)
_PROFILE = re.compile(rb"\x01\x80\x37\x80\x01\x00(.{8})(?=\x01\x80\x59\x80\x01\x00\x03\x00{7})", re.DOTALL)
_DIRECTION = re.compile(rb"\x28\x80\x01\x00" + _INT + rb"(.{4})\x06\x80\x01\x00(.{4})", re.DOTALL)
_PROFILE_NAME = re.compile(r"^(.*?)(?: \[profile (\d+)\])?$", re.DOTALL)
_BUILD_ID = re.compile(rb"\x00([0-9a-f]{16})(?=\x00)")


class DamagedPlanError(Exception):
    """The file contradicts its own table of contents; the text is half a sentence."""


class UnknownLayoutError(Exception):
    """The file is of another kind or version than this reader knows; the text is half a sentence."""


@dataclass(frozen=True)
class PlanTensor:
    """An input or output; dimensions that a profile leaves open are −1."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    is_input: bool


@dataclass(frozen=True)
class PlanPlugin:
    """A plugin layer: the graph node it comes from, its op, and the attributes it keeps."""

    node: str
    op: str
    attributes: dict[str, int | float | str]


@dataclass(frozen=True)
class Plan:
    """An engine, as far as known; None = not known from this source."""

    tensors: list[list[PlanTensor]]  # per profile
    profiles: list[dict[str, Range]]  # per profile, of inputs
    plugins: list[list[PlanPlugin]] | None = None  # per profile
    version: str | None = None
    targets: list[str] | None = None
    library_builds: list[str] | None = field(default=None)  # build ids in the embedded libraries; [] = no library


def read_plan(path: Path) -> Plan:
    """Read an engine file; raises DamagedPlanError, UnknownLayoutError, OSError. The weights inside are not touched."""
    with path.open("rb") as file:
        size = path.stat().st_size
        if not size:
            raise DamagedPlanError("is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            sections = _sections(data, size)
            version = ".".join(str(byte) for byte in data[24:28])
            bits, = struct.unpack_from("<I", data, 32)
            libraries = [data[start:end] for tag, start, end in sections if tag == _LIBRARY]
            engines = [data[start:end] for tag, start, end in sections if tag == _ENGINE]
    if len(engines) != 1 or bits >> len(_TARGETS):
        raise UnknownLayoutError(f"holds {len(engines)} engines for targets {bits:#x}")
    try:
        tensors = _tensors(engines[0])
        profiles = _profiles(engines[0], tensors)
        plugins = _plugins(engines[0], len(profiles))
    except (struct.error, KeyError, IndexError, UnicodeDecodeError) as error:
        raise UnknownLayoutError(f"has tensors or plugins in a form that is not known ({error!r})") from None
    return Plan(tensors, profiles, plugins, version, [name for bit, name in _TARGETS.items() if bits >> bit & 1],
                [found for library in libraries for found in _build_ids(library)])


def _sections(data: mmap.mmap, size: int) -> list[tuple[bytes, int, int]]:
    """Tag, start and end of each section; they fill the file."""
    if data[:4] != _MAGIC:
        raise UnknownLayoutError(f"begins with {data[:4]!r}, not with {_MAGIC!r}")
    if size < _TABLE + 24:
        raise DamagedPlanError(f"ends after {size} bytes, within its table of contents")
    said, = struct.unpack_from("<Q", data, 16)
    if said != size:
        raise DamagedPlanError(f"has {size} bytes, its table of contents says {said}")
    sections, at, first = [], _TABLE, size
    while at + 24 <= first:
        tag, start, length = struct.unpack_from("<8sQQ", data, at)
        if not at < start <= start + length <= size:
            raise UnknownLayoutError("has a table of contents in a form that is not known")
        sections.append((tag.rstrip(b"\0"), start, start + length))
        first, at = min(first, start), at + 24
    return sections


def _build_ids(library: bytes) -> list[str]:
    """Strings that look like our build id; a library without one is named as such."""
    if library[:4] != b"\x7fELF":
        raise UnknownLayoutError("has a plugin library that is no ELF file")
    return [match[1].decode() for match in _BUILD_ID.finditer(library)] or ["unknown"]


def _string(data: bytes, at: int) -> tuple[str, int]:
    """The string value that begins at `at`, and where it ends."""
    match = _STRING.match(data, at)
    if not match:
        raise KeyError(f"no string at {at}")
    end = match.end() + struct.unpack("<Q", match[1])[0]
    if end > len(data):
        raise KeyError(f"a string beyond the end at {at}")
    return data[match.end():end].decode(), end


def _int(data: bytes, at: int) -> tuple[int, int]:
    if data[at:at + 4] != _INT:
        raise KeyError(f"no integer at {at}")
    return struct.unpack_from("<i", data, at + 4)[0], at + 8


def _dims(data: bytes, at: int) -> tuple[tuple[int, ...], int]:
    """Dimensions that begin at `at`, and where they end; none for the shapes of an output in a profile."""
    if _int(data, at)[0] < 0:
        return (), at + 8
    match = _DIMS.match(data, at)
    if not match or struct.unpack("<i", match[1])[0] != (count := struct.unpack("<Q", match[2])[0]) or count > 8:
        raise KeyError(f"no dimensions at {at}")
    return struct.unpack_from(f"<{count}q", data, match.end()), match.end() + 8 * count


def _tensors(data: bytes) -> list[list[PlanTensor]]:
    """Inputs and outputs per profile, in the network's order."""
    found: dict[int, tuple[int, PlanTensor]] = {}
    for match in re.finditer(rb"\x41\x80\x01\x00(?=\x13\x80\x01\x00.{8}\x01\x80\x0c\x80\x01\x00)", data, re.DOTALL):
        text, at = _string(data, match.end())
        # A tensor's record: name, two flags, type, strides, dimensions, then direction and index of an input or output.
        dtype, _ = _int(data, at + 13)
        where = data.find(b"\x59\x80\x01\x00", at, at + 200)
        if where < 0:
            continue
        dims, at = _dims(data, where + 4)
        direction = _DIRECTION.match(data, at + 14)
        if not direction:
            continue  # an intermediate tensor
        mode, index = struct.unpack("<ii", direction[1] + direction[2])
        name = _PROFILE_NAME.match(text)
        assert name
        shape = tuple(dim if dim >= 0 else -1 for dim in dims)  # negative: a number of a symbol
        if len(name[2] or "") > 2:
            raise KeyError(f"profile {name[2]}")
        found[index] = int(name[2] or 0), PlanTensor(name[1], DTYPES.get(dtype, f"type {dtype}"), shape, mode == 0)
    if not found or sorted(found) != list(range(len(found))):
        raise KeyError("inputs and outputs are not numbered through")
    profiles = [[tensor for _, (which, tensor) in sorted(found.items()) if which == profile]
                for profile in range(1 + max(which for which, _ in found.values()))]
    return profiles


def _profiles(data: bytes, tensors: list[list[PlanTensor]]) -> list[dict[str, Range]]:
    """Shapes each profile allows; they are listed in the order of the inputs and outputs."""
    profiles: list[dict[str, Range]] = []
    for match in _PROFILE.finditer(data):
        ranges: dict[str, Range] = {}
        count, at = struct.unpack("<Q", match[1])[0], match.end()
        if len(profiles) == len(tensors) or count != len(tensors[len(profiles)]):
            raise KeyError("profiles and tensors do not match")
        for tensor in tensors[len(profiles)]:
            shapes = []
            at += 14
            for _ in range(3):
                shape, at = _dims(data, at)
                shapes.append(shape)
                at += 2
            at += 2
            if tensor.is_input:
                ranges[tensor.name] = shapes[0], shapes[1], shapes[2]
        profiles.append(ranges)
    if len(profiles) != len(tensors):
        raise KeyError("profiles and tensors do not match")
    return profiles


def _plugins(data: bytes, profiles: int) -> list[list[PlanPlugin]]:
    """Plugin layers of our namespace, per profile."""
    layers: list[list[PlanPlugin]] = [[] for _ in range(profiles)]
    texts = [match.start() for match in _STRING.finditer(data)]
    for index, start in enumerate(texts):
        op, at = _string(data, start)
        if op not in NAMES or data[start - 4:start] != b"\x5b\x80\x01\x00":
            continue
        _, at = _string(data, at)  # version
        namespace, at = _string(data, at)
        count, at = _int(data, at)
        attributes: dict[str, int | float | str] = {}
        for _ in range(count):
            name, at = _string(data, at)
            attributes[name], at = _attribute(data, at)
        node = _PROFILE_NAME.match(_string(data, texts[index - 2])[0])  # node, chosen variant, op
        assert node
        if namespace == PLUGIN_NAMESPACE:
            layers[int(node[2] or 0)].append(PlanPlugin(node[1], op, attributes))
    return layers


def _attribute(data: bytes, at: int) -> tuple[int | float | str, int]:
    """A plugin field: length, type, value."""
    _, at = _int(data, at)
    kind, at = _string(data, at)
    if kind == "CHAR":
        return _string(data, at)
    format_ = {"INT32": "<i", "FP32": "<f"}[kind]
    return struct.unpack_from(format_, data, at + 14)[0], at + 18
