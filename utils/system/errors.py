"""Errors a user can mend: one clear line that names the key or file, and the mend."""

from __future__ import annotations

EXIT_BAD_INPUT = 2
"""Exit code of every entry point when the input (config, file, request) is wrong."""

EXIT_PREEMPTED = 75
"""Exit code of a run that was asked to stop and stored its state: the same command goes on from there (EX_TEMPFAIL)."""


class UserError(Exception):
    """Wrong input. The message is one line that names the key or file and says how to mend it.

    Entry points print it without a traceback and exit with `EXIT_BAD_INPUT`.
    """


class ParamError(UserError):
    """A config key is unknown, of the wrong type, out of range, or contradicts another."""


class Busy(UserError):
    """Another process is at work on the same level; its run is left as it is."""


class Preempted(Exception):
    """The run was asked to stop and has stored its state; every rank raises it at the same point.

    The message is one line: what stopped the run and where it resumes. Entry points print it on rank 0 and exit with
    `EXIT_PREEMPTED`.
    """
