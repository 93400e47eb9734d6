"""Data sets: one function with one decorator each; the decorator's traits are what `auto` settles to.

A data set's function opens one split: `(directory, split, download) -> Source`, `split` being "train" or "test".
It raises UserError, naming the folder and the mend, when the data is missing or not what its name says.

Traits
    classes         number of classes; None: found by scanning (`folder`)
    size            side of a training image, pixels; None: 224 (see utils/data/resolve.py)
    augment, flip   what the field does to training images ("none", "crop", "rrc"; horizontal mirror)
    mean, std       of the training pixels, 0 to 255, per RGB channel
    max_resolution  longest side in .beton files; None: from the image size
    eval_ratio      side of the evaluation centre crop over the image's shorter side; None: from the image size
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from utils.data.protocol import Source
from utils.system.registry import Registry

SPLITS = ("train", "test")

OpenSplit = Callable[[Path, str, bool], Source]

dataset: Registry[OpenSplit] = Registry("dataset")


def open_split(name: str, directory: Path, split: str, download: bool = False) -> Source:
    """Open `split` ("train" or "test") of the data set `name` in `directory`, downloading it first where that is wanted
    and possible. Raises UserError when it is missing or damaged."""
    if split not in SPLITS:
        raise ValueError(f"split is 'train' or 'test', not {split!r}")
    return dataset[name](directory, split, download)
