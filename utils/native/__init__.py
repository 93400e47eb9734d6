"""Native code: decoding a part of a JPEG and resizing, and the masked optimizer step. Built by `make setup`, never at
run time.

`load` and `load_update` give the libraries, or say why there is none; everything works without them, only slower.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
LIBRARY = HERE.parents[1] / "build" / "native" / "libsieve.so"
SOURCES = ("jpeg.cpp", "resize.cpp", "version.cpp", "Makefile")
"""What the library is built from, in the order the Makefile takes its digest."""
UPDATE = LIBRARY.with_name("libsieve_update.so")
UPDATE_SOURCES = ("update.cpp", "version.cpp", "Makefile")
"""The optimizer step's library and what it is built from."""

_POINTER, _NUMBER, _REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double


class Missing(Exception):
    """There is no library that can be used. The message says why, in a few words."""


Box = tuple[int, int, int, int]
"""y, x, height, width."""


@functools.cache
def load() -> ctypes.CDLL:
    """The library at LIBRARY, its functions declared. Raises Missing: not built, of other sources, not loadable.

    sieve_decode   (data, bytes, height, width, y, x, h, w, scale, exact, out, capacity, placed) -> 0 when it could
    sieve_resize   (pixels, rows, columns, y, x, h, w, out, height, width, filter, mirror) -> 0 when it did
    """
    library = _open(LIBRARY, SOURCES, ("sieve_decode", "sieve_resize"))
    library.sieve_decode.argtypes = [_POINTER, *(_NUMBER,) * 9, _POINTER, _NUMBER, _POINTER]
    library.sieve_resize.argtypes = [_POINTER, *(_NUMBER,) * 6, _POINTER, *(_NUMBER,) * 4]
    return library


@functools.cache
def load_update() -> ctypes.CDLL:
    """The library at UPDATE, its functions declared. Raises Missing as `load` does.

    sieve_sgd    (count, weights, gradients, momenta, live, sizes, fresh, rate, momentum, dampening, decay, nesterov,
                 threads) -> 0 when it did
    sieve_adam   (count, weights, gradients, first, second, live, sizes, rate, beta1, beta2, eps, decay, decoupled,
                 steps, vector, threads) -> 0 when it did
    """
    library = _open(UPDATE, UPDATE_SOURCES, ("sieve_sgd", "sieve_adam"))
    library.sieve_sgd.argtypes = [_NUMBER, *(_POINTER,) * 6, *(_REAL,) * 4, *(_NUMBER,) * 2]
    library.sieve_adam.argtypes = [_NUMBER, *(_POINTER,) * 6, *(_REAL,) * 5, _NUMBER, _REAL, *(_NUMBER,) * 2]
    return library


def _open(path: Path, sources: tuple[str, ...], functions: tuple[str, ...]) -> ctypes.CDLL:
    if not path.is_file():
        raise Missing("it is not built")
    try:
        library = ctypes.CDLL(str(path))
        library.sieve_sources.restype = ctypes.c_char_p
        built_from = library.sieve_sources().decode()
        for name in functions:
            getattr(library, name)
    except (OSError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise Missing(f"it cannot be loaded ({reason})") from error
    if built_from != digest(sources):
        raise Missing("it was built from other sources")
    return library


def digest(sources: tuple[str, ...] = SOURCES) -> str:
    """16 hex digits of the sources as they are now."""
    text = b"".join((HERE / name).read_bytes() for name in sources)
    return hashlib.sha256(text).hexdigest()[:16]


def decode(jpeg: np.ndarray, height: int, width: int, box: Box, scale: int = 1, exact: bool = False) -> np.ndarray:
    """The box of a JPEG (contiguous uint8 [bytes]) at 1/`scale` of its size (1, 2 or 4): uint8 RGB [h, w, 3].

    `exact` takes the exact inverse transform, else FFCV's fast one. Raises Missing, and ValueError for data that is
    damaged, of another size than `height` x `width`, or a box outside of it.
    """
    pixels, placed = np.empty(3 * height * width, np.uint8), np.empty(6, np.int64)
    source, target, where = jpeg.ctypes.data, pixels.ctypes.data, placed.ctypes.data
    code = load().sieve_decode(source, jpeg.size, height, width, *box, scale, exact, target, pixels.size, where)
    if code:
        reason = {1: "damaged", 2: "of another size"}.get(code, "asked for a part it does not have")
        raise ValueError(f"the JPEG is {reason}")
    rows, columns, y, x, h, w = placed.tolist()
    return pixels[: 3 * rows * columns].reshape(rows, columns, 3)[y : y + h, x : x + w]


def resize(
    image: np.ndarray, box: Box, height: int, width: int, bilinear: bool = False, mirror: bool = False
) -> np.ndarray | None:
    """The box of `image` (contiguous uint8 [H, W, 3]) as uint8 [height, width, 3]; None for what is left to OpenCV.

    Raises Missing, and ValueError for a box outside the image.
    """
    made = np.empty((height, width, 3), np.uint8)
    source, target = image.ctypes.data, made.ctypes.data
    code = load().sieve_resize(source, *image.shape[:2], *box, target, height, width, bilinear, mirror)
    if code == 3:
        raise ValueError(f"box {box} is not within {image.shape[:2]}")
    return None if code else made
