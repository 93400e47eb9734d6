"""Errors a user can mend: one clear line that names the key or file, and the mend."""

from __future__ import annotations

EXIT_BAD_INPUT = 2
"""Exit code of every entry point when the input (config, file, request) is wrong."""


class UserError(Exception):
    """Wrong input. The message is one line that names the key or file and says how to mend it.

    Entry points print it without a traceback and exit with `EXIT_BAD_INPUT`.
    """


class ParamError(UserError):
    """A config key is unknown, of the wrong type, out of range, or contradicts another."""
