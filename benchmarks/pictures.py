"""Pictures made to cost what photographs cost a JPEG decoder, for machines where no photographs are at hand.

Dead leaves (Lee, Mumford and Huang 2001): opaque shapes of random colour whose radii follow a power law, so that edges
come at every scale; texture and shading with a 1/f amplitude spectrum on top; chroma weaker and smoother than luma. The
texture is as strong as brings 500 x 375 pixels at quality 90 to about 51 KB, the mean of natural photographs.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from PIL import Image

SIZES = ((375, 500), (375, 500), (375, 500), (333, 500), (500, 375), (500, 333), (500, 500))
"""Height and width of pictures whose longer side is 500, as often as photographs have them (3 : 2 and 4 : 3)."""

LEAVES = 240
TEXTURE, SHADING = 4.3, 18.0
"""Standard deviations in grey levels of what lies on each leaf, and of the light over the whole picture."""


class Pictures:
    """A `Source` of synthetic pictures, all in memory; `side` squeezes each into a square of that side."""

    def __init__(self, count: int, seed: int = 0, side: int | None = None, classes: int = 10) -> None:
        self.images = [picture(seed + number, *SIZES[number % len(SIZES)]) for number in range(count)]
        if side is not None:
            self.images = [
                np.asarray(Image.fromarray(one).resize((side, side), Image.Resampling.BOX)) for one in self.images
            ]
        self.labels = np.arange(count, dtype=np.int64) % classes
        self.classes = [str(number) for number in range(classes)]

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> Image.Image:
        """The picture at `index`."""
        return Image.fromarray(self.images[index])

    def digest(self) -> str:
        """Not a file: named by what makes it."""
        return "synthetic pictures"


def picture(seed: int, height: int, width: int) -> np.ndarray:
    """One picture: uint8 RGB [height, width, 3], a function of its arguments alone."""
    rng = np.random.default_rng(seed)
    luma, blue, red = _leaves(rng, height, width)
    luma = luma + TEXTURE * _noise(rng, height, width, 0.75) + SHADING * _noise(rng, height, width, 1.6)
    blue = blue + 3.0 * _noise(rng, height, width, 1.4)
    red = red + 3.0 * _noise(rng, height, width, 1.4)
    # JFIF's colour transform, from luma and chroma to RGB.
    rgb = np.stack([luma + 1.402 * red, luma - 0.344 * blue - 0.714 * red, luma + 1.772 * blue], axis=2)
    return np.clip(np.rint(rgb), 0, 255).astype(np.uint8)


def _leaves(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Luma and two chromas [3, height, width] of shapes that cover each other; radii from 4 px have density r^-3."""
    planes = np.empty((3, height, width))
    planes[:] = _colour(rng)[:, None, None]
    radii = np.sort(np.minimum(4.0 / np.sqrt(rng.uniform(1e-4, 1.0, LEAVES)), 200.0))[::-1]
    for radius in radii:
        y, x = rng.uniform(0, height), rng.uniform(0, width)
        top, left = max(0, int(y - radius)), max(0, int(x - radius))
        rows = np.arange(top, min(height, int(y + radius) + 1))[:, None] - y
        columns = np.arange(left, min(width, int(x + radius) + 1))[None, :] - x
        turn = rng.uniform(0, np.pi)
        along, across = rows * np.cos(turn) + columns * np.sin(turn), columns * np.cos(turn) - rows * np.sin(turn)
        # A soft edge of a pixel, as a lens gives it; every leaf has its own shading.
        distance = np.hypot(along, across / rng.uniform(0.3, 1.0))
        cover = np.clip(radius - distance + 0.5, 0.0, 1.0)
        slope = rng.normal(0, 12 / radius)
        part = planes[:, top : top + len(rows), left : left + columns.shape[1]]
        colour = _colour(rng)[:, None, None] + np.stack([slope * along, 0 * along, 0 * along])
        part += cover * (colour - part)
    return planes


def _colour(rng: np.random.Generator) -> np.ndarray:
    return np.array([np.clip(rng.normal(115, 55), 5, 250), rng.normal(0, 12), rng.normal(0, 12)])


def _noise(rng: np.random.Generator, height: int, width: int, power: float) -> np.ndarray:
    """Gaussian noise of unit variance whose amplitude falls as 1 / frequency^power."""
    spectrum = np.fft.rfft2(rng.standard_normal((height, width))) * _falling(height, width, power)
    field = np.fft.irfft2(spectrum, s=(height, width))
    return field / field.std()


@lru_cache(maxsize=64)
def _falling(height: int, width: int, power: float) -> np.ndarray:
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    frequency[0, 0] = np.inf
    return frequency**-power
