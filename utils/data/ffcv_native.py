"""Which code makes an image's pixels: FFCV's own, or the native library, which decodes only the part that is needed.

data.resize says what the pixels shall be:

ffcv       what FFCV gives, bit for bit: the fast inverse transform, then OpenCV's INTER_AREA. Part by part where the
           native library is there and its bits are FFCV's on this machine, else by FFCV itself: a run's pixels do not
           depend on it.
area       the exact inverse transform, at 1/2 or 1/4 of the size where the box is at least that much larger than the
           image made of it, then INTER_AREA.
bilinear   the same, then two pixels each way, as OpenCV's INTER_LINEAR: no antialiasing. The fastest.

The last two need the native library.
"""

from __future__ import annotations

import ctypes
import functools
import logging

import cv2
import numpy as np

from utils import native
from utils.data.ffcv_import import ctypes_imdecode, ctypes_resize
from utils.system.errors import UserError

log = logging.getLogger(__name__)

WHOLE, PART, SCALED = range(3)
"""How a JPEG is decoded: whole, by FFCV; only its part, to FFCV's bits; only its part, exactly and scaled."""

FFCV_RESIZE, AREA, BILINEAR = -1, 0, 1
"""Who resizes: FFCV, or the native library with one of its filters."""

_CHECKED_SIZE = (61, 83)
_CHECKED_BOXES = (((5, 7, 50, 70), 32), ((9, 3, 20, 24), 40), ((3, 11, 30, 60), 41))
"""Boxes (y, x, height, width) and sides: one that shrinks, one that grows, one that does both."""


def ways(resize: str) -> tuple[int, int]:
    """How to decode and who resizes, for data.resize. Raises UserError when it needs a library that is not there."""
    library, trouble = _library()
    if library is None:
        if resize == "ffcv":
            return WHOLE, FFCV_RESIZE
        raise UserError(
            f"data.resize={resize}: the native library is needed and {trouble}; "
            "run make setup (it needs libjpeg62-turbo-dev), or set data.resize=ffcv"
        )
    if resize == "ffcv":
        return _like_ffcv()
    return SCALED, BILINEAR if resize == "bilinear" else AREA


def tell(resize: str) -> None:
    """One log line where images are decoded slower than they could be. Raises UserError as `ways` does."""
    decoding, resizing = ways(resize)
    if decoding == WHOLE:
        trouble = _library()[1] or "its bits are not FFCV's on this machine"
        log.warning("native decoder: %s (make setup); JPEGs are decoded whole by FFCV, slower, same pixels", trouble)
    elif resizing == FFCV_RESIZE:
        log.warning("native resizing differs from FFCV's OpenCV on this machine; FFCV resizes, slower, same pixels")


def _library() -> tuple[ctypes.CDLL | None, str]:
    try:
        return native.load(), ""
    except native.Missing as missing:
        return None, str(missing)


@functools.cache
def _like_ffcv() -> tuple[int, int]:
    """What of the native library gives FFCV's bits here: FFCV may be built with another OpenCV or libjpeg-turbo."""
    height, width = _CHECKED_SIZE
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    jpeg = cv2.imencode(".jpg", image, [int(cv2.IMWRITE_JPEG_QUALITY), 90])[1]
    decodes = resizes = True
    whole = np.empty_like(image)
    ctypes_imdecode(
        jpeg.ctypes.data, jpeg.size, height, width, whole.ctypes.data, height, width, 0, 0, 1, 1, False, False
    )
    for box, side in _CHECKED_BOXES:
        y, x, h, w = box
        decodes &= np.array_equal(native.decode(jpeg, height, width, box), whole[y : y + h, x : x + w])
        wanted = np.empty((side, side, 3), np.uint8)
        ctypes_resize(0, image.ctypes.data, height, width, y, y + h, x, x + w, wanted.ctypes.data, side, side)
        made = native.resize(image, box, side, side)
        resizes &= made is not None and np.array_equal(made, wanted)
    return PART if decodes else WHOLE, AREA if resizes else FFCV_RESIZE
