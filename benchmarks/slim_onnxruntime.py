"""Make an unpacked onnxruntime-gpu small enough to be carried: machine code of one GPU, files that a session needs.

    python benchmarks/slim_onnxruntime.py SITE [--code 90] [--list]

SITE: a folder with onnxruntime/ in it; changed in place. `--list` changes nothing and says which machine code is there
(cuobjdump --list-elf says the same). Standard library only, but for zstandard: that machine code is compressed
with it.

The CUDA provider holds its kernels in the section .nv_fatbin: containers, each with one entry per GPU generation. Here
a container keeps its entries of one compute capability and says that it is that long; the rest is zeros, which take no
room in an archive. Nothing moves in the file, so whatever points to a container stays right, and a container is again
what nvcc writes for one generation. A container without such an entry stays whole: CUDA says the same of it as before.
A container of kernels that no graph of ours reaches (UNREACHED) becomes one of that kind: with machine code of another
generation, the smallest there is. It is loaded when one of its kernels is launched, which then fails by name.
"""

from __future__ import annotations

import argparse
import re
import shutil
import struct
import sys
from collections import Counter
from pathlib import Path

PROVIDER = "onnxruntime/capi/libonnxruntime_providers_cuda.so"
# What opening and running a session never looks at, the largest first.
NOT_NEEDED = ("capi/libonnxruntime.so*", "transformers", "quantization", "tools", "ThirdPartyNotices.txt",
              "capi/libonnxruntime_providers_tensorrt.so", "datasets", "**/__pycache__")
# Flash attention, a third of what is left: kernels of Attention, GroupQueryAttention and their like. Bundles have
# DmoeAttention, whose body is MatMul and Softmax.
UNREACHED = re.compile(rb"11onnxruntime5flash")
_CONTAINER, _ELF, _PTX = 0xBA55ED50, 2, 1
_LZ4, _ZSTD = 0x2000, 0x8000  # flags of an entry


class SlimError(Exception):
    """The file is not what this program understands; one sentence."""


def section(data: bytes | bytearray, wanted: str) -> tuple[int, int]:
    """Offset and size of a section of a 64-bit ELF file."""
    if bytes(data[:6]) != b"\x7fELF\x02\x01":
        raise SlimError("This is no 64-bit little-endian ELF file.")
    table, = struct.unpack_from("<Q", data, 40)
    size, count, names_at = struct.unpack_from("<HHH", data, 58)
    headers = [struct.unpack_from("<IIQQQQ", data, table + i * size) for i in range(count)]
    names = headers[names_at][4]
    for name, _, _, _, offset, length in headers:
        if data[names + name:data.index(b"\0", names + name)] == wanted.encode():
            return offset, length
    raise SlimError(f"The file has no section {wanted}.")


def containers(data: bytes | bytearray) -> list[tuple[int, int, list[tuple[int, int, int, int]]]]:
    """Start, length of the header, and entries (offset, length, kind, compute capability) of every container."""
    start, size = section(data, ".nv_fatbin")
    found, at, end = [], start, start + size
    while at < end:
        magic, _, header, length = struct.unpack_from("<IHHQ", data, at)
        if magic == 0 and not any(data[at:at + 8]):  # room that was left free
            at += 8
            continue
        if magic != _CONTAINER or at + header + length > end:
            raise SlimError(f"At {at:#x}, .nv_fatbin is not what this program knows (magic {magic:#x}).")
        entries, entry = [], at + header
        while entry < at + header + length:
            kind, _, head, payload = struct.unpack_from("<HHIQ", data, entry)
            code, = struct.unpack_from("<I", data, entry + 28)
            if kind not in (_ELF, _PTX) or not 32 <= head <= 1024:
                raise SlimError(f"At {entry:#x}, an entry of .nv_fatbin is of kind {kind}, its header {head} bytes.")
            entries.append((entry, head + payload, kind, code))
            entry += head + payload
        if entry != at + header + length:
            raise SlimError(f"At {at:#x}, the entries of a container are longer than it says.")
        found.append((at, header, entries))
        at = entry
    return found


def kernels(data: bytes | bytearray, offset: int) -> list[bytes]:
    """Mangled names of the kernels in an entry of machine code. Raises SlimError."""
    head, = struct.unpack_from("<I", data, offset + 4)
    payload, packed = struct.unpack_from("<QI", data, offset + 8)
    flags, _, size = struct.unpack_from("<QQQ", data, offset + 40)
    code = bytes(data[offset + head:offset + head + (packed or payload)])
    if flags & _LZ4:
        raise SlimError(f"At {offset:#x}, machine code is compressed with LZ4, which this program cannot read.")
    if flags & _ZSTD:
        try:
            import zstandard
        except ImportError:
            raise SlimError("Machine code is compressed: Python's package zstandard is needed to read it.") from None
        code = zstandard.ZstdDecompressor().decompress(code, max_output_size=size)
    return re.findall(rb"\.nv\.constant0\.([^\0]+)\0", code)


def stand_in(data: bytes | bytearray, code: int) -> bytes:
    """The smallest machine code that a GPU of this compute capability does not take; empty where there is none."""
    others = [(length, offset) for _, _, entries in containers(data) for offset, length, kind, other in entries
              if kind == _ELF and other // 10 != code // 10]
    length, offset = min(others, default=(0, 0))
    return bytes(data[offset:offset + length])


def trim(data: bytearray, code: int) -> Counter[str]:
    """Keep one compute capability's machine code; what was kept, in entries and bytes. Raises SlimError."""
    said: Counter[str] = Counter()
    other = stand_in(data, code)
    for at, header, entries in containers(data):
        kept = [entry for entry in entries if entry[2:] == (_ELF, code)]
        said["containers"] += 1
        if not kept:
            said["left whole"] += 1
            said["bytes"] += sum(length for _, length, *_ in entries)
            continue
        room = sum(length for _, length, *_ in entries)
        names = [name for offset, *_ in kept for name in kernels(data, offset)]
        if names and all(map(UNREACHED.search, names)) and 0 < len(other) <= room:
            said["unreached"] += 1
            kept, body = [], other
        else:
            body = b"".join(bytes(data[offset:offset + length]) for offset, length, *_ in kept)
        data[at + header:at + header + room] = body + bytes(room - len(body))
        struct.pack_into("<Q", data, at + 8, len(body))
        said["kept"] += len(kept)
        said["dropped"] += len(entries) - len(kept)
        said["bytes"] += len(body)
    if not said["kept"]:
        raise SlimError(f"No container has machine code for compute capability {code}.")
    return said


def listing(data: bytes | bytearray) -> str:
    """Which machine code is there, in one line. Raises SlimError."""
    found = containers(data)
    codes = Counter(code for _, _, entries in found for _, _, kind, code in entries if kind == _ELF)
    return ("machine code by compute capability: " +
            ", ".join(f"{code} in {count}" for code, count in sorted(codes.items())) + f" of {len(found)} containers")


def read_provider(site: Path) -> bytearray:
    """The CUDA provider of a folder with onnxruntime/ in it. Raises SlimError."""
    provider = site / PROVIDER
    if not provider.is_file():
        raise SlimError(f"{site} has no {PROVIDER}; it is to be onnxruntime-gpu, unpacked.")
    return bytearray(provider.read_bytes())


def slim(site: Path, code: int) -> str:
    """A folder with onnxruntime/ in it, in place; what was done, in one line. Raises SlimError."""
    data = read_provider(site)
    said = trim(data, code)
    (site / PROVIDER).write_bytes(data)
    for pattern in NOT_NEEDED:
        for path in sorted((site / "onnxruntime").glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return (f"{said['kept']} of {said['kept'] + said['dropped']} pieces of machine code kept for compute capability "
            f"{code}; of {said['containers']} containers {said['left whole']} have none and stay whole, "
            f"{said['unreached']} lost theirs, which no graph of ours reaches; "
            f"{said['bytes'] / 1e6:.1f} MB of machine code in all")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("site", type=Path)
    parser.add_argument("--code", type=int, default=90, help="compute capability, such as 90 [90]")
    parser.add_argument("--list", action="store_true", help="change nothing, say what is there")
    chosen = parser.parse_args()
    try:
        print(listing(read_provider(chosen.site)) if chosen.list else slim(chosen.site, chosen.code))
    except (SlimError, OSError) as problem:
        sys.exit(f"[slim] {problem}")
