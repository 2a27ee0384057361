"""A checkpoint argument is a folder, or a Hugging Face hub id that is downloaded (resumable) into the hub cache."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import CheckpointError, MissingRequirementError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FILES = ["config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*.json", "chat_template.jinja"]


def resolve_checkpoint(source: str | Path) -> Path:
    """The local folder of a checkpoint; a hub id (`org/name`) is fetched first."""
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{folder} is a file; give the checkpoint's folder.")
    if not _HUB_ID.fullmatch(str(source)) or (folder.parent.is_dir() and str(folder.parent) != "."):
        raise CheckpointError(f"Checkpoint folder {folder} does not exist; give a folder or a hub id such as org/name.")
    return _download(str(source))


def _download(hub_id: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise MissingRequirementError(
            "Reading from the hub needs huggingface_hub; run: pip install 'dmoe-export[export]'.") from error
    try:
        return Path(snapshot_download(hub_id, allow_patterns=_FILES))
    except Exception as error:  # huggingface_hub raises many kinds; each means the same to the user
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{hub_id} is no local folder and could not be fetched from the hub: {reason} "
                              "Run again to resume.") from error
