"""A checkpoint argument is a folder, or a Hugging Face hub id that is downloaded (resumable) into the hub cache."""

from __future__ import annotations

from pathlib import Path

from ..errors import CheckpointError
from ..hub import HubError, fetch, hub_id

FILES = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "quantize_config.json",
         "quant_config.json", "hf_quant_config.json", "tokenizer*.json", "tokenizer.model", "vocab.json", "vocab.txt",
         "merges.txt", "added_tokens.json", "special_tokens_map.json", "chat_template.*", "additional_chat_templates/*",
         "LICENSE*", "README.md")
"""What is fetched of a checkpoint: all that the export reads."""


def resolve_checkpoint(source: str | Path) -> Path:
    """The local folder of a checkpoint; a hub id (`org/name`) is fetched first."""
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{folder} is a file; give the checkpoint's folder.")
    name = hub_id(source)
    if name is None:
        raise CheckpointError(f"Checkpoint folder {folder} does not exist; give a folder or a hub id such as org/name.")
    try:
        return fetch(name, FILES)
    except HubError as error:
        raise CheckpointError(f"{name} is no local folder and could not be fetched from the hub: {error} "
                              "Run again to resume.") from error
