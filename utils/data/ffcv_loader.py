"""Loader `ffcv`: images from a .beton file, decoded and augmented by compiled code, normalised on the device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numba
import numpy as np
import torch

from utils.data import augment, beton_format
from utils.data.batching import Batching
from utils.data.ffcv_epoch import EpochReader, Job
from utils.data.ffcv_native import ways
from utils.data.ffcv_ops import BOX_Y, COLUMNS, HEIGHT, MIRROR, OFFSET, SHIFT_Y, WIDTH, PlannedDecoder
from utils.data.ffcv_pipeline import Pipeline
from utils.data.order import Shard
from utils.data.protocol import Batch
from utils.data.spec import DataSpec
from utils.system.cpus import allowed_cpus
from utils.system.errors import UserError


class FFCVLoader(Batching):
    """A `Loader` of the images of one .beton file.

    Order, boxes, shifts and mirrors are `Batching`'s and `augment`'s; JPEGs are decoded and resized as data.resize
    says (`ffcv_native`). Pixels stay bytes until they are on the device. Built once per split; its code is compiled at
    the first batch. Raises UserError for a data.resize that needs a library which is not there, and, while iterating,
    for an image whose part that is needed cannot be decoded.
    """

    def __init__(
        self,
        spec: DataSpec,
        beton: Path,
        indices: np.ndarray,
        shard: Shard,
        device: torch.device,
        *,
        training: bool,
        order_seed: int,
        channels_last: bool,
        workers: int,
        eval_batch: int,
    ) -> None:
        super().__init__(indices, shard, training=training, order_seed=order_seed, eval_batch=eval_batch)
        self.spec, self.device, self.channels_last = spec, device, channels_last
        threads: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
        self.workers = max(1, min(workers, allowed_cpus(), threads))
        self._mean = torch.tensor(spec.mean, dtype=torch.float32, device=device)
        self._std = torch.tensor(spec.std, dtype=torch.float32, device=device)
        header = beton_format.read_header(beton)
        self._table = beton_format.image_table(header, beton_format.read_metadata(header))
        if len(self.indices) and self.indices.max() >= header.samples:
            raise UserError(f"{beton}: holds {header.samples} samples and image {self.indices.max()} is asked for")
        sizes = self._table[self.indices]
        self._largest = int((3 * sizes[:, HEIGHT] * sizes[:, WIDTH]).max(initial=1))
        decoder = PlannedDecoder(self._side(), parallel=self.workers > 1)
        self._pipeline = Pipeline(beton, decoder, device, spec.data.os_cache)
        self._ways = ways(spec.data.resize)
        self._readers: set[EpochReader] = set()

    def __iter__(self) -> Iterator[Batch]:
        # What set_epoch chose is read here, not at the first batch.
        batches = [np.ascontiguousarray(self.indices[positions]) for positions in self.begin()]
        return self._read(batches, self.key, self._side())

    def close(self) -> None:
        """End every iteration that is still open."""
        for reader in list(self._readers):
            reader.close()
        self._readers.clear()

    def _side(self) -> int:
        return (self.size or self.spec.image_size) if self.training else self.spec.eval_size

    def _read(self, batches: list[np.ndarray], key: int, side: int) -> Iterator[Batch]:
        if not batches:
            return
        self._pipeline.decoder.side = side
        reader = EpochReader(self._pipeline, self._job(batches, key), self.device, self.workers)
        self._readers.add(reader)
        try:
            corners, cutout = self._corners(batches, key, side)

            def finish(number: int, pixels: torch.Tensor, labels: torch.Tensor) -> Batch:
                images = augment.normalise(pixels, self._mean, self._std, self.channels_last)
                if corners is not None:
                    augment.erase(images, corners[number], cutout)
                return images, labels.reshape(-1).clone()

            yield from reader.read(finish)
        finally:
            reader.close()
            self._readers.discard(reader)

    def _corners(self, batches: list[np.ndarray], key: int, side: int) -> tuple[torch.Tensor | None, int]:
        """Cutout's corners of every batch on the device [batches, B, 2], and its side."""
        if not (self.training and self.spec.data.cutout):
            return None, 0
        cutout = augment.cutout_side(self.spec.data.cutout, self.spec.image_size, side)
        corners = augment.cutout_corners(key, np.concatenate(batches), side, cutout)
        return torch.from_numpy(corners).to(self.device).reshape(len(batches), -1, 2), cutout

    def _job(self, batches: list[np.ndarray], key: int) -> Job:
        spec = self.spec
        shifted = self.training and spec.augment == "crop"

        def plan(samples: np.ndarray) -> np.ndarray:
            rows = np.zeros((len(samples), COLUMNS), np.int64)
            rows[:, OFFSET : OFFSET + 5] = self._table[samples]
            heights, widths = rows[:, HEIGHT], rows[:, WIDTH]
            if self.training and spec.augment == "rrc":
                rows[:, BOX_Y : BOX_Y + 4] = augment.rrc_boxes(key, samples, heights, widths)
            else:
                ratio = 1.0 if self.training else spec.eval_ratio
                rows[:, BOX_Y : BOX_Y + 4] = centre_boxes(heights, widths, ratio)
            if shifted:
                rows[:, SHIFT_Y : SHIFT_Y + 2] = augment.crop_offsets(key, samples, spec.data.pad)
            if self.training and spec.flip:
                rows[:, MIRROR] = augment.flips(key, samples)
            return rows

        pad, canvas = (spec.data.pad, spec.image_size) if shifted else (-1, 1)
        return Job(batches, plan, self._largest, self._ways, pad, canvas)


def centre_boxes(heights: np.ndarray, widths: np.ndarray, ratio: float) -> np.ndarray:
    """Centre squares (y, x, side, side), int(ratio * shorter side) wide, of images of the given sizes: int64 [n, 4]."""
    sides = np.maximum(1, (ratio * np.minimum(heights, widths)).astype(np.int64))
    return np.stack([(heights - sides) // 2, (widths - sides) // 2, sides, sides], axis=1)
