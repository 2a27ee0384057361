"""Ray Serve's configuration file: an application per bundle (schema: `ray.serve.schema.ServeDeploySchema`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..errors import RequestError

IMPORT_PATH = "dmoe_export.serving.ray:app"
_PREFIX = re.compile(r"[A-Za-z0-9._~-]+")  # what a path shows as it is


def serve_config(applications: Mapping[str, Mapping[str, Any]], host: str, port: int) -> dict[str, Any]:
    """`applications`: the arguments of each by the name of its model.

    One application answers below /, several below /NAME each. Raises RequestError for a name that is no part of a path.
    """
    several = len(applications) > 1
    wrong = next((name for name in applications if several and not _PREFIX.fullmatch(name)), None)
    if wrong is not None:
        raise RequestError(f"Model name {wrong} cannot stand in a path, and several bundles answer below their names; "
                           "choose one of letters, digits, dots and dashes with --name.")
    return {
        "proxy_location": "EveryNode", "http_options": {"host": host, "port": port, "keep_alive_timeout_s": 30},
        "applications": [{"name": name, "route_prefix": f"/{name}" if several else "/", "import_path": IMPORT_PATH,
                          "args": dict(arguments)} for name, arguments in applications.items()]}
