"""Errors that are the user's to solve: the command line prints them as one line, without a traceback."""

from __future__ import annotations

# What to say when an optional package is missing.
INSTALL = "pip install 'fused-resnet[train]'"


class UserError(Exception):
    """A mistake or an obstacle outside the program. `exit_code` is what the command line returns."""

    exit_code = 1


class OptionError(UserError, ValueError):
    """An option has a value that makes no sense."""

    exit_code = 2


class DataError(UserError, ValueError):
    """The data are missing, broken or of an unknown kind."""


class CheckpointError(UserError, RuntimeError):
    """A checkpoint is missing, corrupt or of another run."""


class DivergedError(UserError, RuntimeError):
    """The loss stopped being a finite number."""
