"""What every loader and every source of images looks like."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from PIL import Image

Batch = tuple[torch.Tensor, torch.Tensor]
"""Normalised float32 images [B, 3, H, W] and int64 labels [B], both on the device; the caller may keep them."""


class Source(Protocol):
    """A split of a data set as it lies on disk: random access to images, labels known without decoding any."""

    labels: np.ndarray
    classes: list[str]

    def __len__(self) -> int: ...

    def image(self, index: int) -> Image.Image:
        """The RGB image at `index`, undistorted."""
        ...

    def digest(self) -> str:
        """Hex digest that changes when the split's files do (names, sizes and labels; contents where that is cheap)."""
        ...


class Loader(Protocol):
    """Batches of one split on the device.

    Training order depends only on (order seed, level, epoch), pixels also on the sample index. Evaluation loaders visit
    every sample once over all ranks, in order; `set_epoch` changes nothing there.
    """

    start_batch: int
    """Batch the next iteration starts at; 0 again once it has begun."""

    @property
    def samples(self) -> int:
        """Samples of one epoch over all ranks (train: after dropping the incomplete last global batch)."""
        ...

    def set_epoch(self, level: int, epoch: int, start_batch: int = 0, size: int | None = None) -> None:
        """Choose the order of the next iteration; `size` is the image side of progressive resizing."""
        ...

    def __len__(self) -> int:
        """Batches of a whole epoch on this rank."""
        ...

    def __iter__(self) -> Iterator[Batch]: ...

    def close(self) -> None:
        """Stop threads and free buffers; the loader can be iterated again afterwards."""
        ...
