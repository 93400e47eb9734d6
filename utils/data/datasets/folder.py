"""Any folder of class folders."""

from __future__ import annotations

from pathlib import Path

from utils.data.datasets import dataset
from utils.data.datasets.sources import class_folders
from utils.data.protocol import Source


@dataset(
    "folder",
    classes=None,
    size=None,
    augment=None,
    flip=True,
    mean=(123.675, 116.28, 103.53),
    std=(58.395, 57.12, 57.375),
    max_resolution=None,
    eval_ratio=None,
)
def folder(directory: Path, split: str, download: bool) -> Source:
    """Your own images: data.root holds train/<class>/ and test/<class>/ (or val/<class>/)."""
    return class_folders(directory, split)
