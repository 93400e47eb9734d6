"""The loader's native code: decoding a part of a JPEG, and resizing. Built by `make setup`, never at run time.

`load` gives the library, or says why there is none; everything works without it, only slower.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
from pathlib import Path

HERE = Path(__file__).resolve().parent
LIBRARY = HERE.parents[1] / "build" / "native" / "libsieve.so"
SOURCES = ("jpeg.cpp", "resize.cpp", "version.cpp", "Makefile")
"""What the library is built from, in the order the Makefile takes its digest."""

_POINTER, _NUMBER = ctypes.c_void_p, ctypes.c_int64


class Missing(Exception):
    """There is no library that can be used. The message says why, in a few words."""


@functools.cache
def load(path: Path = LIBRARY) -> ctypes.CDLL:
    """The library at `path`, its functions declared as the sources say. Raises Missing: not built, stale, not loadable.

    sieve_decode   (data, bytes, height, width, y, x, h, w, scale, exact, out, capacity, placed) -> 0 when it could
    sieve_resize   (pixels, rows, columns, y, x, h, w, out, height, width, filter, mirror) -> 0 when it did
    """
    if not path.is_file():
        raise Missing("it is not built")
    try:
        library = ctypes.CDLL(str(path))
        library.sieve_sources.restype = ctypes.c_char_p
        built_from = library.sieve_sources().decode()
        library.sieve_decode.argtypes = [_POINTER, *(_NUMBER,) * 9, _POINTER, _NUMBER, _POINTER]
        library.sieve_resize.argtypes = [_POINTER, *(_NUMBER,) * 6, _POINTER, *(_NUMBER,) * 4]
    except (OSError, AttributeError) as error:
        raise Missing(f"it cannot be loaded ({' '.join(str(error).split())})") from error
    if built_from != digest():
        raise Missing("it was built from other sources")
    return library


def digest() -> str:
    """16 hex digits of the sources as they are now."""
    text = b"".join((HERE / name).read_bytes() for name in SOURCES)
    return hashlib.sha256(text).hexdigest()[:16]
