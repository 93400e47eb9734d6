"""scikit-learn's bundled handwritten digits: real images that need no download."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
from PIL import Image

from utils.data.datasets import dataset
from utils.data.datasets.sources import ArraySource
from utils.data.protocol import Source
from utils.data.splits import split as stratified

SIDE = 16
TEST_SHARE = 0.2
SPLIT_SEED = 0


@dataset(
    "digits",
    classes=10,
    size=SIDE,
    augment="crop",
    flip=False,
    mean=(78.99, 78.99, 78.99),
    std=(88.54, 88.54, 88.54),
    max_resolution=SIDE,
    eval_ratio=1.0,
)
def digits(directory: Path, split: str, download: bool) -> Source:
    """scikit-learn's handwritten digits: 1,438 training and 359 test images, 8 px shown at 16 px, 10 classes.

    Grey levels 0 to 16 become 0 to 255, upscaled by Pillow's bicubic filter; the test images are a stratified fifth,
    the same for every run. `directory` and `download` are not used.
    """
    images, labels = _all()
    train, test = stratified(labels, TEST_SHARE, SPLIT_SEED)
    chosen = train if split == "train" else test
    return ArraySource(images[chosen], labels[chosen], [str(digit) for digit in range(10)])


@functools.cache
def _all() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    bundle = load_digits()
    grey = np.rint(bundle.images * (255 / 16)).astype(np.uint8)
    large = [np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for image in grey]
    return np.repeat(np.stack(large)[..., None], 3, axis=3), bundle.target.astype(np.int64)
