"""How the C library hands out memory."""

from __future__ import annotations

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_NEVER, _HUGE, _LARGE = 2**31 - 1, 2**30, 2**25


def keep_freed() -> bool:
    """Let freed memory stay with the process, for the next step to use. Returns whether the C library does so.

    glibc gives large blocks back to the system when they are freed. A training step on a CPU frees its activations and
    gradients and asks for them again a moment later; the system then clears every page anew. Blocks of 1 GiB and more
    are still given back. Other C libraries are left as they are.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    set_option = ctypes.CDLL(None).mallopt
    trimmed = bool(set_option(_TRIM_THRESHOLD, _NEVER))
    # Older versions take no more than 32 MiB, which still covers most layers.
    return any(bool(set_option(_MMAP_THRESHOLD, size)) for size in (_HUGE, _LARGE)) and trimmed
