"""The JSON schema of the report (docs/check-report.md)."""

from __future__ import annotations

import json
from pathlib import Path

from .result import CheckReport


def schema_text() -> str:
    """The schema as it stands in docs/check-report.schema.json."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **CheckReport.model_json_schema(
        mode="serialization")}
    return json.dumps(schema, indent=1) + "\n"


def write_schema(path: str | Path) -> None:
    """Write it."""
    Path(path).write_text(schema_text(), encoding="utf-8")
