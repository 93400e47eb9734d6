"""The compiled part of the FFCV loader: decode, crop, resize, shift and mirror images as a plan says.

FFCV's own augmentations draw from numba's random state, which is each thread's own and cannot be seeded, so nothing is
drawn here: every batch comes with a plan, one row of whole numbers per image, and a kernel that only follows it. The
kernel is compiled once per process and shared by all loaders.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numba import njit, prange

from utils.data.beton_format import JPG
from utils.data.ffcv_import import AllocationQuery, SimpleRGBImageDecoder, State, ctypes_imdecode, ctypes_resize

BOX_Y, BOX_X, BOX_H, BOX_W, SHIFT_Y, SHIFT_X, MIRROR, FAILED = range(8)
"""Columns of a plan, int64 [batch, COLUMNS].

BOX_*    the part of the stored image that is taken
SHIFT_*  top left corner of the window in the image padded by `pad` (0 to 2 * pad)
MIRROR   1: left to right
FAILED   written by the kernel: 1 where a JPEG could not be decoded
"""
COLUMNS = 8


@njit(nogil=True)
def _mirror_in_place(image: Any) -> None:
    height, width, _ = image.shape
    for row in range(height):
        for left in range(width // 2):
            right = width - 1 - left
            for channel in range(3):
                kept = image[row, left, channel]
                image[row, left, channel] = image[row, right, channel]
                image[row, right, channel] = kept


@njit(nogil=True)
def _copy_window(source: Any, top: Any, left: Any, mirror: Any, out: Any) -> None:
    """out[r, c] = source[top + r, left + c], 0 outside source; mirrored when asked."""
    height, width, _ = out.shape
    rows, columns, _ = source.shape
    first, last = max(0, -left), min(width, columns - left)
    for row in range(height):
        if top + row < 0 or top + row >= rows or last <= first:
            out[row] = 0
            continue
        if mirror:
            out[row, : width - last] = 0
            for column in range(first, last):
                for channel in range(3):
                    out[row, width - 1 - column, channel] = source[top + row, left + column, channel]
            out[row, width - first :] = 0
        else:
            out[row, :first] = 0
            for column in range(first, last):
                for channel in range(3):
                    out[row, column, channel] = source[top + row, left + column, channel]
            out[row, last:] = 0


@njit(nogil=True)
def _resize(source: Any, y: Any, x: Any, height: Any, width: Any, out: Any) -> None:
    """`out` becomes the box of `source`, resized by OpenCV by pixel areas."""
    ctypes_resize(
        0,
        source.ctypes.data,
        source.shape[0],
        source.shape[1],
        y,
        y + height,
        x,
        x + width,
        out.ctypes.data,
        out.shape[0],
        out.shape[1],
    )


@njit(nogil=True)
def _follow(image: Any, row: Any, pad: Any, canvas: Any, shifted: Any, out: Any) -> None:
    """Make `out` [S, S, 3] of a decoded `image` as a plan's row says.

    With pad >= 0 the box is brought to the side of `canvas`, shifted in black padding, and brought to S.
    """
    y, x, height, width = row[BOX_Y], row[BOX_X], row[BOX_H], row[BOX_W]
    side = out.shape[0]
    mirror = row[MIRROR] != 0
    if pad < 0:
        if height == side and width == side:
            _copy_window(image[y : y + height, x : x + width], 0, 0, mirror, out)
            return
        _resize(image, y, x, height, width, out)
    else:
        inner = canvas.shape[0]
        top, left = row[SHIFT_Y] - pad, row[SHIFT_X] - pad
        target = out if side == inner else shifted
        if height == inner and width == inner:
            _copy_window(image[y : y + height, x : x + width], top, left, mirror, target)
        else:
            _resize(image, y, x, height, width, canvas)
            _copy_window(canvas, top, left, mirror, target)
        if side != inner:
            _resize(shifted, 0, 0, inner, inner, out)
        return
    if mirror:
        _mirror_in_place(out)


@njit(nogil=True)
def _read_mapped(address: Any, storage: Any) -> Any:
    size = storage[2][np.searchsorted(storage[1], address)]
    return storage[0][address : address + size]


@njit(nogil=True)
def _read_pages(address: Any, storage: Any) -> Any:
    """`storage` is (pages [slots, page size], addresses, sizes, slot of each page); page sizes are powers of two."""
    size = storage[2][np.searchsorted(storage[1], address)]
    page_size = np.uint64(storage[0].shape[1])
    page = address // page_size
    offset = address - page * page_size
    return storage[0][storage[3][page], offset : offset + size]


@functools.cache
def kernel(parallel: bool, mapped: bool) -> Callable[..., None]:
    """The function that fills a batch, compiled for one thread or several, for a mapped file or FFCV's page cache.

    Arguments: sample indices [B]; out uint8 [B, S, S, 3]; plan int64 [B, COLUMNS]; pad (below 0: none); decoded uint8
    [threads, largest image]; canvas and shifted uint8 [threads, side, side, 3]; image metadata; FFCV's storage state.
    """
    read = _read_mapped if mapped else _read_pages

    def fill(
        batch: Any, out: Any, plan: Any, pad: Any, decoded: Any, canvas: Any, shifted: Any, metadata: Any, storage: Any
    ) -> None:
        threads = decoded.shape[0]
        count = len(batch)
        # A share of the batch per thread, so that each thread has its own scratch whatever the threading layer does.
        for thread in prange(threads):
            for place in range(thread * count // threads, (thread + 1) * count // threads):
                field = metadata[batch[place]]
                height, width = np.int64(field["height"]), np.int64(field["width"])
                data = read(field["data_ptr"], storage)
                plan[place, FAILED] = 0
                if field["mode"] == JPG:
                    plain = decoded[thread, : height * width * 3]
                    result = ctypes_imdecode(
                        data.ctypes.data,
                        data.size,
                        height,
                        width,
                        plain.ctypes.data,
                        height,
                        width,
                        0,
                        0,
                        1,
                        1,
                        False,
                        False,
                    )
                    if result != 0:
                        plan[place, FAILED] = 1
                        continue
                    _follow(
                        plain.reshape(height, width, 3), plan[place], pad, canvas[thread], shifted[thread], out[place]
                    )
                else:
                    _follow(
                        data.reshape(height, width, 3), plan[place], pad, canvas[thread], shifted[thread], out[place]
                    )

    compiled: Callable[..., None] = njit(nogil=True, parallel=parallel)(fill)
    return compiled


class PlannedDecoder(SimpleRGBImageDecoder):  # type: ignore[misc]  # FFCV has no types
    """FFCV decoder that hands every batch to `kernel`, with the plan and scratch it is given as its memory."""

    def __init__(self, side: int, parallel: bool, mapped: bool) -> None:
        super().__init__()
        self.side = side
        self._kernel = kernel(parallel, mapped)

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        """One uint8 image [side, side, 3] per sample."""
        shape, kind = (self.side, self.side, 3), np.dtype(np.uint8)
        return replace(previous_state, jit_mode=True, shape=shape, dtype=kind), AllocationQuery(shape, kind)

    def generate_code(self) -> Callable[..., Any]:
        """A function FFCV compiles; its memory is (out, plan, pad, decoded, canvas, shifted)."""
        fill = self._kernel

        def decode(batch: Any, memory: Any, metadata: Any, storage: Any) -> Any:
            out, plan, pad, decoded, canvas, shifted = memory
            fill(batch, out, plan, pad, decoded, canvas, shifted, metadata, storage)
            return out

        return decode
