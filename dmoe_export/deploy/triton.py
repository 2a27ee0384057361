"""A model of a Triton repository that runs a bundle: `config.pbtxt`, and a `model.py` that imports this package."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Literal

from ..errors import OutputError, RequestError
from ..words import visible

Kind = Literal["cpu", "gpu"]
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_MARK = "# Written by dmoe-export deploy triton"
# name, type, dimensions; all are optional, and the model says what is missing.
INPUTS = (("text_input", "STRING", 1), ("input_ids", "INT64", -1), ("messages", "STRING", 1), ("stream", "BOOL", 1),
           ("sampling_parameters", "STRING", 1), ("exclude_input_in_output", "BOOL", 1),
           ("return_finish_reason", "BOOL", 1), ("return_num_input_tokens", "BOOL", 1),
           ("return_num_output_tokens", "BOOL", 1))
OUTPUTS = (("text_output", "STRING", -1), ("output_ids", "INT64", -1), ("finish_reason", "STRING", -1),
            ("num_input_tokens", "UINT32", 1), ("num_output_tokens", "UINT32", -1))
MODEL_FILE = f'''{_MARK}; the bundle and its options are in ../config.pbtxt.
import sys

try:
    from dmoe_export.serving.triton.model import TritonPythonModel
except ModuleNotFoundError as error:
    raise ImportError(f"{{error.name}} is not installed in the Python of this Triton server ({{sys.executable}}); "
                      "install dmoe-export there with its extras cpu or gpu, and triton.") from None
'''


def check_model_name(name: str) -> None:
    """Raise RequestError for what cannot be the name of a model, which is that of a folder and part of URLs."""
    if not _NAME.fullmatch(name):
        raise RequestError(f"Model name {name[:200]!r} must have 1 to 200 letters, digits, dots, dashes and "
                           "underscores, and begin with a letter or digit; choose one with --name.")


def model_config(name: str, parameters: Mapping[str, object], kind: Kind = "cpu", instances: int = 1,
                 command: str = "") -> str:
    """The text of `config.pbtxt`.

    `instances`: processes with the bundle, on the CPU or on each GPU; `command`: what made it, for the head.
    """
    head = [f"{_MARK}; --force writes it anew.", *([f"# {visible(command)}"] if command else [])]
    lines = [*head, f"name: {_quoted(name)}", 'backend: "python"', "max_batch_size: 0",
             "model_transaction_policy { decoupled: true }",
             f"instance_group [ {{ kind: KIND_{kind.upper()} count: {instances} }} ]"]
    for field, tensors, more in (("input", INPUTS, " optional: true"), ("output", OUTPUTS, "")):
        rows = [f"  {{ name: {_quoted(one)} data_type: TYPE_{type_} dims: [ {dims} ]{more} }}"
                for one, type_, dims in tensors]
        lines += [f"{field} [", ",\n".join(rows), "]"]
    lines += [f"parameters {{ key: {_quoted(key)} value {{ string_value: {_quoted(str(value))} }} }}"
              for key, value in parameters.items()]
    return "\n".join(lines) + "\n"


def write_model(repository: Path, name: str, config: str, overwrite: bool = False) -> Path:
    """Write a model into a repository, which is made where it is missing; the model's folder.

    With `overwrite` the two files of one that was written by this are written anew; other files stay. Each appears at
    once, the configuration last. Raises OutputError for anything else that is there, and where nothing can be written.
    """
    folder = repository / name
    config_file = folder / "config.pbtxt"
    if folder.exists() or folder.is_symlink():
        if not overwrite:
            raise OutputError(f"{folder} exists already; choose another --out or --name, or add --force.")
        if not _is_ours(config_file):
            raise OutputError(f"{folder} was not written by dmoe-export deploy triton, so it stays; choose another "
                              "--out or --name, or remove it.")
    try:
        (folder / "1").mkdir(parents=True, exist_ok=True)
        _put(folder / "1" / "model.py", MODEL_FILE)
        _put(config_file, config)
    except OSError as error:
        raise OutputError(f"{error.filename or folder} cannot be written: {error.strerror}; choose another "
                          "--out.") from None
    return folder


def _is_ours(config_file: Path) -> bool:
    try:
        with config_file.open(encoding="utf-8", errors="replace") as file:
            return file.readline(200).startswith(_MARK)
    except OSError:
        return False


def _put(path: Path, content: str) -> None:
    """A server that polls sees the old file or the new one."""
    handle, made = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(content)
        Path(made).chmod(0o644)
        Path(made).replace(path)
    except BaseException:
        with suppress(OSError):
            Path(made).unlink()
        raise


def _quoted(text: str) -> str:
    """A string of protobuf's text format: what is not plain ASCII as octal bytes."""
    return '"' + "".join(chr(byte) if 32 <= byte < 127 and byte not in b'"\\' else f"\\{byte:03o}"
                         for byte in os.fsencode(text)) + '"'
