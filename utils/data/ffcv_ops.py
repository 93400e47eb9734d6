"""The compiled part of the FFCV loader: decode, crop, resize, shift and mirror images as a plan says.

FFCV's own augmentations draw from numba's random state, which is each thread's own and cannot be seeded, so nothing is
drawn here: every batch comes with a plan, one row of whole numbers per image, and a kernel that only follows it. The
kernel is one for all loaders, and numba keeps its machine code on disk for the next process.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import llvmlite.binding
import numpy as np
from numba import njit, prange, types

from utils import native
from utils.data.beton_format import JPG
from utils.data.ffcv_import import (
    AllocationQuery,
    IntDecoder,
    SimpleRGBImageDecoder,
    State,
    ctypes_imdecode,
    ctypes_resize,
)
from utils.data.ffcv_native import SCALED, WHOLE

OFFSET, BYTES, HEIGHT, WIDTH, MODE, BOX_Y, BOX_X, BOX_H, BOX_W, SHIFT_Y, SHIFT_X, MIRROR, FAILED = range(13)
"""Columns of a plan, int64 [batch, COLUMNS].

OFFSET, BYTES           where the stored image lies in the storage
HEIGHT, WIDTH, MODE     what it is
BOX_*                   the part of it that is taken
SHIFT_*                 top left corner of the window in the image padded by `pad` (0 to 2 * pad)
MIRROR                  1: left to right
FAILED                  written by the kernel: 1 where a JPEG could not be decoded
"""
COLUMNS = 13


def _native() -> tuple[Any, Any]:
    """The native library's decoder and resizing; where there is none, functions that are never called."""
    try:
        library = native.load()
    except native.Missing:
        return ctypes_imdecode, ctypes_resize
    return library.sieve_decode, library.sieve_resize


# C functions under names of our own: code that calls them by name, not by address, can be kept on disk.
_functions = (ctypes_imdecode, ctypes_resize, *_native())
for _name, _function in zip(
    ("ffcv_imdecode", "ffcv_resize", "native_decode", "native_resize"), _functions, strict=True
):
    llvmlite.binding.add_symbol(f"sieve_{_name}", ctypes.cast(_function, ctypes.c_void_p).value)
_u32, _ptr = types.uint32, types.voidptr
_imdecode: Any = types.ExternalFunction(
    "sieve_ffcv_imdecode",
    types.int32(_ptr, types.uint64, _u32, _u32, _ptr, _u32, _u32, _u32, _u32, _u32, _u32, types.bool_, types.bool_),
)
_resize_c: Any = types.ExternalFunction(
    "sieve_ffcv_resize", types.void(*(types.int64,) * 4, *(types.int64,) * 4, *(types.int64,) * 3)
)
_native_decode: Any = types.ExternalFunction("sieve_native_decode", types.int32(*(types.int64,) * 13))
_native_resize: Any = types.ExternalFunction("sieve_native_resize", types.int32(*(types.int64,) * 12))


def _compiled(parallel: bool) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """numba's compiler, its result kept on disk where there is a place for it."""

    def compile_(function: Callable[..., None]) -> Callable[..., None]:
        try:
            done: Callable[..., None] = njit(nogil=True, parallel=parallel, cache=True)(function)
        except RuntimeError:  # neither __pycache__ nor the user's cache folder can be written
            done = njit(nogil=True, parallel=parallel)(function)
        return done

    return compile_


@njit(nogil=True)
def _mirror_in_place(image: Any) -> None:
    for row in range(image.shape[0]):
        line = image[row]
        for left in range(image.shape[1] // 2):
            right = image.shape[1] - 1 - left
            for channel in range(3):
                line[left, channel], line[right, channel] = line[right, channel], line[left, channel]


@njit(nogil=True)
def _resize(source: Any, y: Any, x: Any, height: Any, width: Any, resizing: Any, mirror: Any, out: Any) -> None:
    """`out` becomes the box of `source`, resized as `resizing` says (`ffcv_native`) and mirrored when asked."""
    rows, columns = source.shape[0], source.shape[1]
    high, wide, pixels, target = out.shape[0], out.shape[1], source.ctypes.data, out.ctypes.data
    if resizing >= 0:
        box = (y, x, height, width)
        if _native_resize(pixels, rows, columns, *box, target, high, wide, resizing, np.int64(mirror)) == 0:
            return
    _resize_c(0, pixels, rows, columns, y, y + height, x, x + width, target, high, wide)
    if mirror:
        _mirror_in_place(out)


@njit(nogil=True)
def _copy(source: Any, out: Any) -> None:
    """Copy bytes; a plain loop over flat arrays becomes memcpy, an assignment of slices does not."""
    for place in range(out.size):
        out[place] = source[place]


@njit(nogil=True)
def _copy_mirrored(source: Any, out: Any) -> None:
    """Copy a line of pixels [n, 3] from right to left."""
    last = len(out) - 1
    for place in range(len(out)):
        out[place, 0] = source[last - place, 0]
        out[place, 1] = source[last - place, 1]
        out[place, 2] = source[last - place, 2]


@njit(nogil=True)
def _copy_window(source: Any, y: Any, x: Any, side: Any, top: Any, left: Any, mirror: Any, out: Any) -> None:
    """Copy a window as large as `out` [S, S, 3] of the square (y, x, side) of `source`, mirrored when asked.

    The window's corner lies at (top, left) of the square and may stick out of it: there `out` is 0.
    """
    size = out.shape[0]
    first, last = max(0, -left), min(size, side - left)
    # Where the part [first, last) of a line that lies inside the square goes.
    begin, end = (size - last, size - first) if mirror else (first, last)
    for row in range(size):
        line = out[row]
        if top + row < 0 or top + row >= side or last <= first:
            line[:] = 0
            continue
        part = source[y + top + row, x + left + first : x + left + last]
        line[:begin] = 0
        line[end:] = 0
        if mirror:
            _copy_mirrored(part, line[begin:end])
        else:
            _copy(part.reshape(-1), line[begin:end].reshape(-1))


@njit(nogil=True)
def _follow(image: Any, box: Any, row: Any, pad: Any, resizing: Any, canvas: Any, shifted: Any, out: Any) -> None:
    """Make `out` [S, S, 3] of the box (y, x, height, width) of an `image` as a plan's row says.

    With pad >= 0 the box is brought to the side of `canvas`, shifted within black padding, and brought to S.
    """
    y, x, height, width = box
    size, mirror = out.shape[0], row[MIRROR] != 0
    if pad < 0:
        if height == size and width == size:
            _copy_window(image, y, x, size, 0, 0, mirror, out)
        else:
            _resize(image, y, x, height, width, resizing, mirror, out)
        return
    inner, top, left = canvas.shape[0], row[SHIFT_Y] - pad, row[SHIFT_X] - pad
    target = out if size == inner else shifted
    if height == inner and width == inner:
        _copy_window(image, y, x, inner, top, left, mirror, target)
    else:
        _resize(image, y, x, height, width, resizing, False, canvas)
        _copy_window(canvas, 0, 0, inner, top, left, mirror, target)
    if size != inner:
        _resize(shifted, 0, 0, inner, inner, resizing, False, out)


@njit(nogil=True)
def _decode(data: Any, row: Any, decoding: Any, side: Any, pixels: Any, placed: Any) -> Any:
    """Decode a JPEG into `pixels`; `placed` [6] becomes its rows and columns there, and the row's box. False: damaged.

    SCALED takes the smallest of the whole, half or quarter image whose box still has `side` pixels each way.
    """
    height, width, box_h, box_w = row[HEIGHT], row[WIDTH], row[BOX_H], row[BOX_W]
    if decoding == WHOLE:
        h, w, zero, one = np.uint32(height), np.uint32(width), np.uint32(0), np.uint32(1)
        size = np.uint64(data.size)
        placed[0], placed[1] = height, width
        placed[2:] = row[BOX_Y : BOX_Y + 4]
        return _imdecode(data.ctypes, size, h, w, pixels.ctypes, h, w, zero, zero, one, one, False, False) == 0
    scale, exact = 1, 0
    if decoding == SCALED:
        exact, ratio = 1, min(box_h, box_w) // side
        scale = 4 if ratio >= 4 else (2 if ratio >= 2 else 1)
    box = (row[BOX_Y], row[BOX_X], box_h, box_w)
    source, target = data.ctypes.data, pixels.ctypes.data
    return (
        _native_decode(source, data.size, height, width, *box, scale, exact, target, pixels.size, placed.ctypes.data)
        == 0
    )


@njit(nogil=True)
def _fill_share(start: Any, stop: Any, out: Any, plan: Any, how: Any, storage: Any, scratch: Any) -> None:
    pad, decoding, resizing = how
    decoded, canvas, shifted = scratch
    side = out.shape[1] if pad < 0 else canvas.shape[0]
    placed = np.empty(6, np.int64)
    for place in range(start, stop):
        row = plan[place]
        data = storage[row[OFFSET] : row[OFFSET] + row[BYTES]]
        row[FAILED] = 0
        if row[MODE] == JPG:
            if not _decode(data, row, decoding, side, decoded, placed):
                row[FAILED] = 1
                continue
            rows, columns = placed[0], placed[1]
            box = (placed[2], placed[3], placed[4], placed[5])
            image = decoded[: rows * columns * 3].reshape(rows, columns, 3)
            _follow(image, box, row, pad, resizing, canvas, shifted, out[place])
        else:
            box = (row[BOX_Y], row[BOX_X], row[BOX_H], row[BOX_W])
            raw = data.reshape(row[HEIGHT], row[WIDTH], 3)
            _follow(raw, box, row, pad, resizing, canvas, shifted, out[place])


@_compiled(parallel=False)
def fill(out: Any, plan: Any, how: Any, storage: Any, decoded: Any, canvas: Any, shifted: Any) -> None:
    """Fill a batch on one thread.

    out uint8 [B, S, S, 3]; plan int64 [B, COLUMNS]; how = (pad, below 0: none; decoding and resizing of `ffcv_native`);
    storage read-only uint8 [bytes]; scratch of each thread: decoded uint8 [threads, largest image], canvas and shifted
    uint8 [threads, side, side, 3].
    """
    _fill_share(0, out.shape[0], out, plan, how, storage, (decoded[0], canvas[0], shifted[0]))


@_compiled(parallel=True)
def fill_parallel(out: Any, plan: Any, how: Any, storage: Any, decoded: Any, canvas: Any, shifted: Any) -> None:
    """`fill` on as many threads as there is scratch for."""
    threads, count = decoded.shape[0], out.shape[0]
    # Each thread has its own share of the batch and its own scratch, whatever the threading layer does.
    for thread in prange(threads):
        start, stop = thread * count // threads, (thread + 1) * count // threads
        scratch = (decoded[thread], canvas[thread], shifted[thread])
        _fill_share(start, stop, out, plan, how, storage, scratch)


class PlannedDecoder(SimpleRGBImageDecoder):
    """FFCV decoder whose memory is what `fill` takes; it makes images of `side` pixels."""

    def __init__(self, side: int, parallel: bool) -> None:
        super().__init__()
        self.side = side
        self._fill = fill_parallel if parallel else fill

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        """One uint8 image [side, side, 3] per sample."""
        shape, kind = (self.side, self.side, 3), np.dtype(np.uint8)
        return replace(previous_state, jit_mode=True, shape=shape, dtype=kind), AllocationQuery(shape, kind)

    def generate_code(self) -> Callable[..., Any]:
        """FFCV's calling convention: (batch indices, memory, metadata, storage state) -> images."""
        run = self._fill

        def decode(batch: Any, memory: Any, metadata: Any, state: Any) -> Any:
            run(*memory)
            return memory[0]

        return decode


class LabelDecoder(IntDecoder):
    """FFCV's integer decoder without its loop."""

    def generate_code(self) -> Callable[..., Any]:
        """FFCV's calling convention: (batch indices, memory, metadata, storage state) -> labels [B, 1]."""

        def decode(batch: Any, memory: Any, metadata: Any, state: Any) -> Any:
            memory[:, 0] = metadata[batch]
            return memory

        return decode
