"""From a `Source` to pixels: centre squares, resized, many at a time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image

from utils.data.protocol import Source

CHUNK = 256


def centre_square(image: Image.Image, ratio: float, size: int) -> Image.Image:
    """The centre square of `image`, int(ratio * shorter side) wide, resized to `size` (bilinear, antialiased)."""
    width, height = image.size
    side = max(1, int(ratio * min(width, height)))
    left, top = (width - side) // 2, (height - side) // 2
    if (width, height) != (side, side):
        image = image.crop((left, top, left + side, top + side))
    return image if side == size else image.resize((size, size), Image.Resampling.BILINEAR)


def decode(source: Source, indices: np.ndarray, size: int, ratio: float, threads: int) -> torch.Tensor:
    """Centre squares of `source`'s images `indices`, by `threads` threads: uint8 [n, size, size, 3] on the CPU."""
    pixels = np.empty((len(indices), size, size, 3), dtype=np.uint8)

    def fill(start: int) -> None:
        for place in range(start, min(start + CHUNK, len(indices))):
            pixels[place] = np.asarray(centre_square(source.image(int(indices[place])), ratio, size))

    with ThreadPoolExecutor(max(1, threads)) as pool:
        jobs = [pool.submit(fill, start) for start in range(0, len(indices), CHUNK)]
        try:
            for job in jobs:
                job.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return torch.from_numpy(pixels)
