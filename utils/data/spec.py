"""`DataSpec`: the `data` section with every `auto` settled from the data set's own traits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from utils import params


@dataclass(frozen=True)
class DataSpec:
    """What a loader needs to know about images. mean and std are in pixel units (0 to 255), per RGB channel."""

    name: str
    directory: Path
    betons: Path
    classes: int
    image_size: int
    eval_size: int
    max_resolution: int
    write_mode: str
    augment: str
    flip: bool
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    eval_ratio: float
    """Side of the evaluation centre crop over the shorter side of the image (1.0: the whole square)."""
    data: params.Data
    """The section it came from, for what needs no settling (pad, cutout, val, jpeg_quality, ...)."""

    def size_at(self, progress: float) -> int | None:
        """Image side of progressive resizing at `progress` (0 to 1) of training, in 16s; None when it is off."""
        first = self.data.progressive_size
        if first is None:
            return None
        start, stop = self.data.progressive_epochs
        share = 1.0 if stop <= start else min(max((progress - start) / (stop - start), 0.0), 1.0)
        size = first + share * (self.image_size - first)
        return self.image_size if share >= 1.0 else min(self.image_size, max(16, round(size / 16) * 16))
