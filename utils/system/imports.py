"""Imports at full speed."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """No garbage collection within it: torch and its company make a million objects as they are imported, which all
    stay, and looking through them again and again takes a quarter of the time that the imports do.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
