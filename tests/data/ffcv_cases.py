"""Small .beton files, and ways to read them, for the tests of the FFCV loader."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

from utils import params
from utils.data import beton, ffcv_loader
from utils.data.order import Shard
from utils.data.spec import DataSpec

CPU = torch.device("cpu")
SAMPLES = 203
MEAN, STD = (120.5, 99.25, 131.0), (61.5, 70.25, 58.75)


class Pictures:
    def __init__(self, images: list[np.ndarray], labels: np.ndarray) -> None:
        self.images, self.labels, self.classes = images, labels, [str(label) for label in range(7)]

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> Image.Image:
        return Image.fromarray(self.images[index])

    def digest(self) -> str:
        return "pictures"


def spec_of(mode: str = "raw", plain: bool = False, **options: object) -> DataSpec:
    """`plain`: pixels come out as they are stored."""
    data = {key: options.pop(key) for key in ("pad", "cutout", "os_cache") if key in options}
    settled = {"image_size": 16, "eval_size": 16, "augment": "crop", "flip": True, "eval_ratio": 1.0, **options}
    if plain:
        settled |= {"augment": "none", "flip": False}
    return DataSpec(
        name="folder",
        directory=Path("/nowhere"),
        betons=Path("/nowhere"),
        classes=7,
        max_resolution=400,
        write_mode=mode,
        mean=(0.0, 0.0, 0.0) if plain else MEAN,
        std=(1.0, 1.0, 1.0) if plain else STD,
        data=params.Data(name="folder", **{"pad": 3, **data}),
        **settled,
    )


def write_files(folder: Path) -> dict[str, tuple[Path, Pictures]]:
    """.beton files and what they hold: square (16 px), numbered (pixel = index), mixed sizes raw and as JPEG."""
    rng = np.random.default_rng(0)
    square = [rng.integers(0, 256, (16, 16, 3), dtype=np.uint8) for _ in range(SAMPLES)]
    numbered = [np.full((16, 16, 3), i, np.uint8) for i in range(SAMPLES)]
    sizes = [(40, 30), (16, 16), (24, 64), (90, 20), (16, 20)]
    mixed = [smooth(rng, *sizes[i % len(sizes)]) for i in range(60)]
    found = {}
    for name, images, mode in (
        ("square", square, "raw"),
        ("numbered", numbered, "raw"),
        ("mixed", mixed, "raw"),
        ("jpeg", mixed, "jpg"),
    ):
        source = Pictures(images, np.arange(len(images)) % 7)
        found[name] = (folder / f"{name}.beton", source)
        beton.write(source, found[name][0], spec_of(mode), 1)
    return found


def smooth(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A picture JPEG keeps well."""
    coarse = rng.integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def load(files, name: str, spec: DataSpec, indices: np.ndarray | None = None, shard: Shard | None = None, **options):
    path, source = files[name]
    options = {
        "training": True,
        "order_seed": 5,
        "channels_last": False,
        "workers": 1,
        "eval_batch": 16,
        **options,
    }
    indices = np.arange(len(source)) if indices is None else indices
    return ffcv_loader.FFCVLoader(spec, path, indices, shard or Shard(0, 1, 20, 1), CPU, **options)


def read(loader, level: int = 0, epoch: int = 0, start: int = 0, size: int | None = None):
    loader.set_epoch(level, epoch, start, size)
    return list(loader)


def same(left, right) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(left, right, strict=True)
    )


def run(program: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", textwrap.dedent(program)]
    return subprocess.run(words, capture_output=True, text=True, timeout=240, check=False)
