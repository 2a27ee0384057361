"""A bundle made of links, as in a hub's cache, for a library that refuses data files outside the graph's folder.

ONNX Runtime follows links when it checks where external data lies (from 1.24 on), and refuses what is not beside the
graph. So it gets such a graph in memory, with the real places of the data files, named from a folder that holds them
all. Which files these may be is the manifest's to say.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from ...bundle.reader import Bundle
from ...errors import BundleError
from ..ort import ort
from .protobuf import field, fields

EXTERNAL_FOLDER = "session.model_external_initializers_file_folder_path"
# Field numbers in onnx.proto.
_MODEL_GRAPH, _GRAPH_INITIALIZER, _TENSOR_EXTERNAL, _KEY, _VALUE = 7, 5, 13, 1, 2


def model_for_session(model: str | bytes, bundle: Bundle, options: ort.SessionOptions) -> str | bytes:
    """What to make a session from: a graph file of the bundle, or an edited graph; `options` learn where data lies.

    Raises BundleError for a graph that is none, or that names a data file which the manifest does not list.
    """
    folder, linked = bundle.folder, has_links(bundle)
    if linked and isinstance(model, str):
        model = Path(model).read_bytes()
    if isinstance(model, bytes):
        if linked:
            try:
                model, folder = with_real_files(model, bundle)
            except ValueError as error:
                raise BundleError(f"{bundle.denoiser_path} is not an ONNX model ({error}); export the bundle "
                                  "again.") from None
        options.add_session_config_entry(EXTERNAL_FOLDER, str(folder.absolute()))
    return model


def has_links(bundle: Bundle) -> bool:
    """Whether any file of a bundle lies elsewhere; that the folder itself is a link does not count."""
    real = Path(os.path.realpath(bundle.folder))
    return any(Path(os.path.realpath(bundle.folder / entry.path)) != real / entry.path
               for entry in bundle.manifest.files)


def with_real_files(model: bytes, bundle: Bundle) -> tuple[bytes, Path]:
    """A serialised ModelProto whose external data is named by its real place, and the folder it is named from.

    Raises ValueError when it is no model, BundleError as above.
    """
    used: list[str] = []

    def note(name: str) -> str:
        used.append(name)
        return name

    relocated(model, note)
    names = set(used)
    if strange := names - {entry.path for entry in bundle.manifest.files}:
        raise BundleError(f"A graph of {bundle.folder} takes weights from {min(strange)}, which the manifest does not "
                          "list; export the bundle again.")
    real = {name: Path(os.path.realpath(bundle.folder / name)) for name in names}
    folder = os.path.commonpath([path.parent for path in real.values()] or [Path(os.path.realpath(bundle.folder))])
    return relocated(model, lambda name: os.path.relpath(real[name], folder)), Path(folder)


def relocated(model: bytes, place_of: Callable[[str], str]) -> bytes:
    """The model with other locations of its initializers' external data; raises ValueError when it is no model."""
    def entry(content: bytes) -> bytes:
        parts = {number: value for number, value, _ in fields(content)}
        if parts.get(_KEY) != b"location":
            return content
        return field(_KEY, b"location") + field(_VALUE, os.fsencode(place_of(os.fsdecode(parts.get(_VALUE, b"")))))

    def inside(content: bytes, path: tuple[int, ...]) -> bytes:
        if not path:
            return entry(content)
        return b"".join(field(number, inside(value, path[1:])) if number == path[0] else whole
                        for number, value, whole in fields(content))

    return inside(model, (_MODEL_GRAPH, _GRAPH_INITIALIZER, _TENSOR_EXTERNAL))
