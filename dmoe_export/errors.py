"""Errors that a user can act on: one sentence each, naming the thing, its value and the fix."""

from __future__ import annotations


class DmoeError(Exception):
    """Base of every error this package raises on purpose; `exit_code` is the command's exit status."""

    exit_code = 1


class CheckError(DmoeError):
    """A numeric or structural check failed (exit code 1)."""

    exit_code = 1


class NotFiniteError(CheckError):
    """A model computed NaN or infinity where an answer is asked, so there is none (exit code 1)."""


class InputError(DmoeError):
    """A file, option or request is not usable as given (exit code 2)."""

    exit_code = 2


class CheckpointError(InputError):
    """A checkpoint folder cannot be read as a model."""


class BundleError(InputError):
    """A bundle is missing, damaged or of another schema."""


class RequestError(InputError):
    """A generation request contradicts the model: bad ids, too long a prompt, bad settings."""


class LengthError(RequestError):
    """A prompt and the answer asked for are together longer than the model or the engine takes."""


class OutputError(InputError):
    """An output could not be written; nothing is left behind."""


class MissingRequirementError(DmoeError):
    """The environment lacks a library, device or plugin (exit code 3)."""

    exit_code = 3


def as_clause(error: DmoeError) -> str:
    """An error's sentence as part of another: without its advice and its dot."""
    return str(error).split("; ")[0].rstrip(".")
