"""Centre squares and decoding in threads."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from utils.data.decode import centre_square, decode
from utils.system.errors import UserError


class Numbers:
    """A source whose image i is grey level i, of sizes that differ; image `bad` cannot be read."""

    def __init__(self, count: int, bad: int = -1) -> None:
        self.labels, self.classes, self.bad = np.zeros(count, dtype=np.int64), ["a"], bad

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Image.Image:
        if index == self.bad:
            raise UserError(f"cannot read image {index}")
        return Image.new("RGB", (8 + index % 3, 8 + index % 5), (index % 256,) * 3)

    def digest(self) -> str:
        return ""


@pytest.mark.parametrize(
    ("width", "height", "ratio", "box"),
    [
        (8, 8, 1.0, (0, 0, 8, 8)),
        (12, 8, 1.0, (2, 0, 10, 8)),
        (9, 13, 1.0, (0, 2, 9, 11)),
        (16, 16, 0.875, (1, 1, 15, 15)),
    ],
)
def test_the_centre_is_cut_before_resizing(width: int, height: int, ratio: float, box: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    cut = pixels[box[1] : box[3], box[0] : box[2]]
    same = np.asarray(centre_square(Image.fromarray(pixels), ratio, box[2] - box[0]))
    np.testing.assert_array_equal(same, cut)
    smaller = np.asarray(centre_square(Image.fromarray(pixels), ratio, 5))
    np.testing.assert_array_equal(smaller, np.asarray(Image.fromarray(cut).resize((5, 5), Image.Resampling.BILINEAR)))


@pytest.mark.parametrize("threads", [1, 3])
def test_every_image_lands_in_its_place(threads: int) -> None:
    indices = np.random.default_rng(0).permutation(1000)[:700]
    pixels = decode(Numbers(1000), indices, 4, 1.0, threads)
    assert pixels.shape == (700, 4, 4, 3)
    np.testing.assert_array_equal(pixels[:, 2, 1, 0].numpy(), indices % 256)
    assert decode(Numbers(3), np.arange(0), 4, 1.0, threads).shape == (0, 4, 4, 3)


@pytest.mark.parametrize("threads", [1, 3])
def test_an_unreadable_image_is_named(threads: int) -> None:
    with pytest.raises(UserError, match="cannot read image 611"):
        decode(Numbers(1000, bad=611), np.arange(1000), 4, 1.0, threads)
