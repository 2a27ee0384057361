"""JSON files of a checkpoint folder, with or without a byte-order mark."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..guards.regular_file import MOST_CONFIG, read_regular


def read_json(path: Path, most: int = MOST_CONFIG) -> dict[str, Any]:
    """The JSON object of a regular file of at most so many bytes; raises CheckpointError when there is none."""
    try:
        value = json.loads(read_regular(path, most).decode("utf-8").removeprefix("\ufeff"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; give the folder of a Hugging Face checkpoint.") from None
    except RecursionError:
        raise CheckpointError(f"{path} is nested too deeply to be a checkpoint's file.") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object; it is not a checkpoint's file.")
    return value
