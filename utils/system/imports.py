"""Imports at full speed."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected(forever: bool = False) -> Iterator[None]:
    """No garbage collection within it: torch and its company make a million objects as they are imported, which all
    stay, and looking through them again and again takes a quarter of the time that the imports do.

    forever: nor later of anything alive at its end, which would look through all of them once more. For entry points,
    before they have made what has to be freed one day: a model in a reference cycle would stay.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if forever:
            gc.freeze()
        if enabled:
            gc.enable()
