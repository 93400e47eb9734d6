"""ImageNet and its smaller relatives: class folders of JPEG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from utils.data.datasets import dataset
from utils.data.datasets.fetch import fetch_folder
from utils.data.datasets.sources import (
    FileSource,
    MissingData,
    check_count,
    class_folders,
    class_names,
    image_files,
    labelled_folders,
)
from utils.data.protocol import Source
from utils.system.errors import UserError

MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)


@dataset(
    "imagenet",
    classes=1000,
    size=224,
    augment="rrc",
    flip=True,
    mean=MEAN,
    std=STD,
    max_resolution=500,
    eval_ratio=224 / 256,
)
def imagenet(directory: Path, split: str, download: bool) -> Source:
    """ImageNet (ILSVRC 2012): 1,281,167 training and 50,000 validation images, 1,000 classes, as class folders."""
    place = _find(directory, ())
    if place is None:
        raise _missing(directory, "the class folders train/<wnid>/*.JPEG and val/<wnid>/*.JPEG")
    return class_folders(place, split, 1000, ("val", "test"))


@dataset(
    "imagenette",
    classes=10,
    size=160,
    augment="rrc",
    flip=True,
    mean=MEAN,
    std=STD,
    max_resolution=320,
    eval_ratio=0.875,
)
def imagenette(directory: Path, split: str, download: bool) -> Source:
    """Imagenette: 10 easy classes of ImageNet, 9,469 training and 3,925 test images (320 px release)."""
    folders = ("imagenette2-320", "imagenette2", "imagenette2-160")
    place = _find(directory, folders)
    if place is None and download:
        from torchvision.datasets import Imagenette

        fetch_folder(lambda at: Imagenette(str(at), size="320px", download=True), directory, folders[0], "Imagenette")
        place = directory / folders[0]
    if place is None:
        raise _missing(directory, "imagenette2-320/ or class folders train/ and val/, or set data.download=true")
    return class_folders(place, split, 10, ("val", "test"))


@dataset(
    "imagewoof",
    classes=10,
    size=160,
    augment="rrc",
    flip=True,
    mean=MEAN,
    std=STD,
    max_resolution=320,
    eval_ratio=0.875,
)
def imagewoof(directory: Path, split: str, download: bool) -> Source:
    """Imagewoof: 10 dog breeds of ImageNet, 9,025 training and 3,929 test images."""
    place = _find(directory, ("imagewoof2-320", "imagewoof2", "imagewoof2-160"))
    if place is None:
        raise _missing(directory, "the unpacked imagewoof2-320.tgz (imagewoof2-320/) or class folders train/ and val/")
    return class_folders(place, split, 10, ("val", "test"))


@dataset(
    "tiny_imagenet",
    classes=200,
    size=64,
    augment="crop",
    flip=True,
    mean=(122.451, 114.2655, 101.3625),
    std=(70.635, 68.6205, 71.9355),
    max_resolution=64,
    eval_ratio=1.0,
)
def tiny_imagenet(directory: Path, split: str, download: bool) -> Source:
    """Tiny ImageNet: 100,000 training and 10,000 validation images of 64 px, 200 classes."""
    place = _find(directory, ("tiny-imagenet-200",))
    if place is None:
        what = "the unpacked tiny-imagenet-200.zip (tiny-imagenet-200/) or class folders train/ and val/"
        raise _missing(directory, what)
    annotations = place / "val" / "val_annotations.txt"
    if not annotations.is_file():
        return class_folders(place, split, 200, ("val", "test"))
    classes = class_names(place)
    check_count(place / "train", classes, 200)
    return labelled_folders(place / "train", classes) if split == "train" else _annotated(annotations, classes)


def _annotated(annotations: Path, classes: list[str]) -> FileSource:
    """The validation images as distributed: `val/images/`, labelled by lines of `file <tab> wnid <tab> box`."""
    folder = annotations.parent / "images"
    label_of = {name: label for label, name in enumerate(classes)}
    labels: dict[str, int] = {}
    for number, line in enumerate(annotations.read_text(encoding="utf-8").splitlines(), start=1):
        words = line.split("\t")
        if len(words) < 2 or words[1] not in label_of:
            raise UserError(f"{annotations}, line {number}: not a file name, a tab and a class; unpack it anew")
        labels[words[0]] = label_of[words[1]]
    files = image_files(folder)
    if files != sorted(labels):
        odd = min(set(files) ^ set(labels))
        raise UserError(f"{annotations} and {folder} differ in {odd!r}; unpack the data set anew")
    return FileSource(folder, files, [labels[file] for file in files], classes)


def _find(directory: Path, names: Sequence[str]) -> Path | None:
    """The first of `directory` and its folders `names` that holds a folder `train`."""
    places = [directory, *(directory / name for name in names)]
    return next((place for place in places if (place / "train").is_dir()), None)


def _missing(directory: Path, what: str) -> MissingData:
    return MissingData(f"no data set in {directory}; put there {what}, or set data.root")
