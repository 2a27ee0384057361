"""Stub."""

from __future__ import annotations


class Grammar:
    """A regular expression, compiled for a vocabulary."""
