"""Replicas of a bundle on Ray Serve: `serve run dmoe_export.serving.ray:app bundle=sample.bundle replicas=2`."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """`app` needs Ray; the settings, and answers that outlive a replica, do not."""
    if name != "app":
        raise AttributeError(f"module {__name__} has no attribute {name}")
    from .application import app

    return app
