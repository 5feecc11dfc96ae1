"""Errors that a user can fix: the message says all there is to know, and a command prints it without a traceback.

Each is also the built-in error that a caller of the library expects. What is raised otherwise is a fault of ours.
"""

from __future__ import annotations

__all__ = ["Interrupted", "InvalidType", "InvalidValue", "MissingExtra", "MissingFile", "UserError"]


class UserError(Exception):
    """The cause lies in what was given: an argument, a file, an installation."""


class InvalidValue(UserError, ValueError):
    """A value, or the content of a file, that is not taken."""


class InvalidType(UserError, TypeError):
    """An argument of another type than is taken."""


class MissingFile(UserError, FileNotFoundError):
    """A file or a folder that is not there."""


class MissingExtra(UserError, ImportError):
    """An optional package that is not installed."""


class Interrupted(KeyboardInterrupt):
    """A command was interrupted, and can resume: `how` says how."""

    def __init__(self, how: str) -> None:
        super().__init__(how)
        self.how = how
