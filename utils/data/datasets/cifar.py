"""CIFAR-10, CIFAR-100 and SVHN: 32 px images, as class folders or as torchvision's own files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from utils.data.datasets import dataset
from utils.data.datasets.fetch import fetched
from utils.data.datasets.sources import ArraySource, class_folders
from utils.data.protocol import Source


@dataset(
    "cifar10",
    classes=10,
    size=32,
    augment="crop",
    flip=True,
    mean=(125.307, 122.961, 113.8575),
    std=(62.985, 62.0925, 66.708),
    max_resolution=32,
    eval_ratio=1.0,
)
def cifar10(directory: Path, split: str, download: bool) -> Source:
    """CIFAR-10: 50,000 training and 10,000 test images of 32 px, 10 classes."""
    return _folders_or_files(directory, split, download, "CIFAR10", 10, _cifar)


@dataset(
    "cifar100",
    classes=100,
    size=32,
    augment="crop",
    flip=True,
    mean=(129.2955, 124.083, 112.4295),
    std=(68.1615, 65.4075, 70.4055),
    max_resolution=32,
    eval_ratio=1.0,
)
def cifar100(directory: Path, split: str, download: bool) -> Source:
    """CIFAR-100: 50,000 training and 10,000 test images of 32 px, 100 classes."""
    return _folders_or_files(directory, split, download, "CIFAR100", 100, _cifar)


@dataset(
    "svhn",
    classes=10,
    size=32,
    augment="crop",
    flip=False,
    mean=(111.6135, 113.169, 120.564),
    std=(50.49, 51.255, 50.235),
    max_resolution=32,
    eval_ratio=1.0,
)
def svhn(directory: Path, split: str, download: bool) -> Source:
    """Street View House Numbers, cropped digits: 73,257 training and 26,032 test images of 32 px, 10 classes."""
    return _folders_or_files(directory, split, download, "SVHN", 10, _svhn)


def _cifar(maker: Any, directory: Path, split: str, download: bool) -> Source:
    files = maker(str(directory), train=split == "train", download=download)
    return ArraySource(files.data, files.targets, list(files.classes))


def _svhn(maker: Any, directory: Path, split: str, download: bool) -> Source:
    files = maker(str(directory), split=split, download=download)
    return ArraySource(np.transpose(files.data, (0, 2, 3, 1)), files.labels, [str(digit) for digit in range(10)])


def _folders_or_files(
    directory: Path,
    split: str,
    download: bool,
    name: str,
    classes: int,
    read: Callable[[Any, Path, str, bool], Source],
) -> Source:
    if (directory / "train").is_dir():
        return class_folders(directory, split, classes)
    from torchvision import datasets as published  # seconds to import, and class folders do not need it

    maker = getattr(published, name)
    return fetched(lambda may: read(maker, directory, split, may), directory, name, download)
