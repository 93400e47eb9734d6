"""Writes a split of a data set as a .beton file: encode in worker processes, lay out in order, replace atomically.

FFCV's own writer waits for ever when a worker dies, and the place of every image depends on which worker was faster.
Here images are laid out in sample order, so the bytes depend on the images and the parameters alone, whatever the
number of workers, and an image that cannot be read ends the writing at once with an error that names it.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from utils.data import beton_format, stateless
from utils.data.datasets.sources import one_line
from utils.data.protocol import Source
from utils.system.errors import UserError

CHUNK = 64
"""Images a worker encodes at a time."""

LONGEST_SIDE = 65535
"""Largest width or height the format can hold."""


@dataclass(frozen=True)
class Encoder:
    """How images become bytes. mode is raw, jpg or proportion (a seeded share of jpg, the rest raw)."""

    mode: str
    max_resolution: int | None
    jpeg_quality: int
    probability: float

    def encode(self, image: np.ndarray, index: int) -> tuple[int, int, int, bytes]:
        """uint8 RGB [H, W, 3] of sample `index` to (stored mode, height, width, bytes)."""
        import cv2

        image = self._shrunk(image)
        height, width = image.shape[:2]
        if not self._as_jpeg(index):
            return beton_format.RAW, height, width, np.ascontiguousarray(image).tobytes()
        bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
        done, data = cv2.imencode(".jpg", bgr, [int(cv2.IMWRITE_JPEG_QUALITY), self.jpeg_quality])
        if not done:
            raise UserError(f"image {index} ({width} x {height}) cannot be encoded as JPEG; set data.write_mode=raw")
        return beton_format.JPG, height, width, data.tobytes()

    def _as_jpeg(self, index: int) -> bool:
        if self.mode != "proportion":
            return self.mode == "jpg"
        return bool(stateless.uniform(stateless.derive("beton jpeg"), np.array([index]), 0)[0] < self.probability)

    def _shrunk(self, image: np.ndarray) -> np.ndarray:
        """Longer side at most max_resolution, by pixel areas, as FFCV's writer shrinks; sides are never below 1."""
        import cv2

        height, width = image.shape[:2]
        if self.max_resolution is None or max(height, width) <= self.max_resolution:
            return image
        ratio = self.max_resolution / max(height, width)
        return cv2.resize(
            image, (max(1, int(ratio * width)), max(1, int(ratio * height))), interpolation=cv2.INTER_AREA
        )

    def page_size(self) -> int:
        """A power of two that holds any raw image of max_resolution; 8 MiB where that is open."""
        needed = 3 * self.max_resolution**2 if self.max_resolution else 1 << 23
        return min(max(beton_format.SMALLEST_PAGE, 1 << (needed - 1).bit_length()), beton_format.LARGEST_PAGE)


Encoded = list[tuple[int, int, int, bytes]]


def encode_range(source: Source, encoder: Encoder, start: int, stop: int) -> Encoded:
    """Read and encode samples start..stop-1. Raises UserError naming the image that cannot be read."""
    done: Encoded = []
    for index in range(start, stop):
        try:
            image = np.asarray(source.image(index))
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"image {index} of the source cannot be read ({type(error).__name__}: {one_line(error)}); "
                "replace or remove its file"
            ) from error
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise UserError(f"image {index} of the source is not an RGB image of bytes ({image.dtype}, {image.shape})")
        if max(image.shape) > LONGEST_SIDE and encoder.max_resolution is None:
            raise UserError(f"image {index} is longer than {LONGEST_SIDE} pixels; set data.max_resolution")
        done.append(encoder.encode(image, index))
    return done


def encoded(source: Source, encoder: Encoder, workers: int) -> Iterator[Encoded]:
    """All samples in order, CHUNK at a time, encoded by `workers` processes (by this one when it is 1)."""
    starts = range(0, len(source), CHUNK)
    if workers <= 1:
        for start in starts:
            yield encode_range(source, encoder, start, min(start + CHUNK, len(source)))
        return
    # fork: sources need no pickling, and a worker starts in milliseconds. Workers touch neither torch nor numba.
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(source, encoder))
    pending: deque[Future[Encoded]] = deque()
    try:
        for start in starts:
            pending.append(pool.submit(_work, start, min(start + CHUNK, len(source))))
            if len(pending) >= 4 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise UserError("a writer process was killed (out of memory?); set data.workers lower and run again") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_job: tuple[Source, Encoder] | None = None


def _start_worker(source: Source, encoder: Encoder) -> None:
    """Set up a worker process: it dies with its parent, leaves Ctrl-C to it, and takes one core."""
    global _job
    _job = (source, encoder)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    import cv2

    cv2.setNumThreads(0)


def _work(start: int, stop: int) -> Encoded:
    assert _job is not None
    return encode_range(*_job, start, stop)


def write_images(handle: BinaryIO, source: Source, encoder: Encoder, workers: int, progress: Progress) -> None:
    """Write a whole .beton file into `handle`, an empty file open for writing."""
    samples, page_size = len(source), encoder.page_size()
    metadata = np.zeros(samples, beton_format.sample_type(("image", "label")))
    metadata["label"] = np.asarray(source.labels, dtype=np.int64)
    table = np.zeros(samples, beton_format.ALLOCATION)
    start = len(beton_format.front(samples, page_size, 0, metadata))
    position, index = beton_format.page_aligned(start, page_size), 0
    for chunk in encoded(source, encoder, workers):
        for mode, height, width, data in chunk:
            if len(data) > page_size:
                raise UserError(
                    f"image {index} takes {len(data)} bytes, more than a page of {page_size}; "
                    "set data.max_resolution, or data.write_mode=jpg"
                )
            if position // page_size != (position + len(data) - 1) // page_size:
                position = beton_format.page_aligned(position, page_size)
            handle.seek(position)
            handle.write(data)
            metadata["image"][index] = (mode, width, height, position)
            table[index] = (index, position, len(data))
            position, index = position + len(data), index + 1
        progress.advance(len(chunk))
    handle.seek(position)
    handle.write(table.tobytes())
    handle.seek(0)
    handle.write(beton_format.front(samples, page_size, position, metadata))


class Progress:
    """A bar on a terminal; a plain line now and then where output goes to a file; nothing when `shown` is false."""

    def __init__(self, path: Path, total: int, shown: bool) -> None:
        self.path, self.total, self.done, self.shown = path, total, 0, shown
        self.due = time.monotonic() + 20.0
        self.bar = tqdm(total=total, desc=path.name, unit=" images", leave=False) if shown and _terminal() else None

    def advance(self, images: int) -> None:
        """`images` more are written."""
        self.done += images
        if self.bar is not None:
            self.bar.update(images)
        elif self.shown and time.monotonic() >= self.due:
            self.due = time.monotonic() + 20.0
            print(f"writing {self.path}: {self.done} of {self.total} images", flush=True)

    def close(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.close()


def _terminal() -> bool:
    return sys.stderr.isatty()
