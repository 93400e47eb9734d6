"""A source of random images and the spec to write it with, for the tests of .beton files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from utils import params
from utils.data.resolve import resolve
from utils.data.spec import DataSpec

CLASSES = 3
CLASS_NAMES = ["ant", "bee", "cat"]


class Pictures:
    """A source of random images of several sizes; `bad` maps an index to what happens there."""

    def __init__(
        self, count: int = 200, sizes: tuple[int, ...] = (24, 40), seed: int = 0, bad: dict | None = None
    ) -> None:
        rng = np.random.default_rng(seed)
        shapes = [(sizes[i % len(sizes)], sizes[(i // 2) % len(sizes)], 3) for i in range(count)]
        self.images = [rng.integers(0, 256, shape, dtype=np.uint8) for shape in shapes]
        self.labels = np.arange(count) % CLASSES
        self.classes = CLASS_NAMES
        self.bad = bad or {}

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> Image.Image:
        if index in self.bad:
            self.bad[index]()
        return Image.fromarray(self.images[index])

    def digest(self) -> str:
        return "pictures"


def spec_of(folder: Path, **data: object) -> DataSpec:
    """A spec of the data set `folder` with three classes, its files in `folder`."""
    for name in CLASS_NAMES:
        (folder / "set" / "train" / name).mkdir(parents=True, exist_ok=True)
    options = {"name": "folder", "root": str(folder / "set"), "betons": str(folder / "betons"), "image_size": 32}
    return resolve(params.Data(**{**options, "max_resolution": 64, **data}))
