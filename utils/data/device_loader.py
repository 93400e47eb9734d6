"""Loader `device`: the whole split as one uint8 tensor on the device, augmented there, a batch at a time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from utils.data import augment
from utils.data.batching import Batching
from utils.data.decode import decode
from utils.data.order import Shard
from utils.data.protocol import Batch, Source
from utils.data.spec import DataSpec
from utils.system.errors import UserError

SHARE = 0.8
"""How much of the device's free memory the images may take."""


class DeviceLoader(Batching):
    """A `Loader` of images that all lie on the device.

    Images are decoded once, as their centre square resized to the image size (evaluation: to eval_size, by
    eval_ratio); a random resized crop then crops that square. Raises UserError when they do not fit.
    """

    def __init__(
        self,
        spec: DataSpec,
        source: Source,
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
        self._mean = torch.tensor(spec.mean, dtype=torch.float32, device=device)
        self._std = torch.tensor(spec.std, dtype=torch.float32, device=device)
        size, ratio = (spec.image_size, 1.0) if training else (spec.eval_size, spec.eval_ratio)
        held = self.indices if training else self.indices[self._mine]
        self._pad = spec.data.pad if training and spec.augment == "crop" else 0
        _check_fits(spec, len(held) * 3 * (size + 2 * self._pad) ** 2, device)
        images = decode(source, held, size, ratio, workers)
        self._images = augment.pad_black(images.to(device), self._pad)
        self._labels = torch.from_numpy(source.labels[held]).to(device)

    def __iter__(self) -> Iterator[Batch]:
        # What set_epoch chose is read here, not at the first batch.
        first, batches = self.start_batch, self.begin()
        if not self.training:
            return self._evaluate(first * self.eval_batch, batches)
        return self._train(batches, self.key, self.size or self.spec.image_size)

    def close(self) -> None:
        """Nothing to stop: the images stay on the device as long as the loader."""

    def _evaluate(self, first: int, batches: list[np.ndarray]) -> Iterator[Batch]:
        for positions in batches:  # only this rank's images are held, in order
            part = slice(first, first + len(positions))
            first = part.stop
            yield self._normalise(self._images[part]), self._labels[part].clone()

    def _train(self, batches: list[np.ndarray], key: int, size: int) -> Iterator[Batch]:
        if not batches:
            return
        rows = np.stack(batches)
        drawn = {"rows": rows, **self._draw(key, self.indices[rows].reshape(-1), size, rows.shape)}
        # One transfer per epoch: the loop below never waits for the device.
        on_device = {name: torch.from_numpy(values).to(self.device) for name, values in drawn.items()}
        for step in range(len(rows)):
            now = {name: values[step] for name, values in on_device.items()}
            images = self._normalise(self._pixels(now, size))
            if "cutout" in now:
                augment.erase(images, now["cutout"], self._cutout_side(size))
            yield images, self._labels[now["rows"]]

    def _draw(self, key: int, samples: np.ndarray, size: int, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        """The epoch's random parameters, each shaped `shape` + its own."""
        spec, drawn = self.spec, {}
        if spec.augment == "crop":
            drawn["offsets"] = augment.crop_offsets(key, samples, self._pad)
        whole = np.full(len(samples), spec.image_size)
        if spec.augment == "rrc":
            drawn["boxes"] = augment.rrc_boxes(key, samples, whole, whole)
        elif size != spec.image_size:
            drawn["boxes"] = np.stack([0 * whole, 0 * whole, whole, whole], axis=1)
        if spec.flip:
            drawn["flips"] = augment.flips(key, samples)
        if spec.data.cutout:
            drawn["cutout"] = augment.cutout_corners(key, samples, size, self._cutout_side(size))
        return {name: values.reshape(*shape, *values.shape[1:]) for name, values in drawn.items()}

    def _pixels(self, now: dict[str, torch.Tensor], size: int) -> torch.Tensor:
        """The batch's augmented images [B, size, size, 3], before normalisation."""
        if "offsets" in now:
            images = augment.crop(self._images, now["rows"], now["offsets"], self.spec.image_size)
        else:
            images = self._images[now["rows"]]
        if "boxes" in now:
            images = augment.resized_crop(images, now["boxes"], size)
        return augment.mirror(images, now["flips"]) if "flips" in now else images

    def _normalise(self, images: torch.Tensor) -> torch.Tensor:
        return augment.normalise(images, self._mean, self._std, self.channels_last)

    def _cutout_side(self, size: int) -> int:
        return augment.cutout_side(self.spec.data.cutout, self.spec.image_size, size)


def _check_fits(spec: DataSpec, needed: int, device: torch.device) -> None:
    free = free_bytes(device)
    if needed > SHARE * free:
        raise UserError(
            f"data.loader=device needs {needed / 2**30:.1f} GiB for {spec.name}, {device} has {free / 2**30:.1f} "
            "GiB free; set data.loader=ffcv or a smaller data.image_size"
        )


def free_bytes(device: torch.device) -> int:
    """Memory that can still be taken on `device`; on the CPU, the less of the machine's and the control group's."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    with contextlib.suppress(OSError, ValueError):  # a limit of "max" is no number
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / name).read_text(encoding="ascii")) for name in ("memory.max", "memory.current"))
        statistics = (group / "memory.stat").read_text(encoding="ascii").split()
        cached = int(statistics[statistics.index("inactive_file") + 1])  # given back when memory is short
        free = min(free, max(0, limit - used + cached))
    return free
