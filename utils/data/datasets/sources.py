"""The two kinds of `Source`: image files in class folders, and images in one array."""

from __future__ import annotations

import functools
import hashlib
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from utils.system.errors import UserError

EXTENSIONS = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
"""Endings of image files, lower case; other files are ignored."""

STAT_THREADS, STAT_CHUNK = 16, 1024
"""File sizes are asked for by so many threads, so many at a time: network file systems answer slowly."""

Labels = Sequence[int] | np.ndarray

_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


class MissingData(UserError):
    """The data set is not there at all, rather than damaged."""


class FileSource:
    """Images that lie in files under one folder. `files` are paths relative to it, labels[i] the class of files[i]."""

    def __init__(self, folder: Path, files: Sequence[str], labels: Labels, classes: list[str]) -> None:
        self.folder = folder
        self.labels = np.asarray(labels, dtype=np.int64)
        self.classes = classes
        # One array, not a list of a million strings: forked loader workers would copy those page by page.
        self._files = np.array([os.fsencode(file) for file in files], dtype=bytes)

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> Path:
        """The file of the image at `index`."""
        return self.folder / os.fsdecode(bytes(self._files[index]))

    def image(self, index: int) -> Image.Image:
        """The RGB image at `index`. Raises UserError naming the file when it cannot be decoded."""
        path = self.path(index)
        try:
            with Image.open(path) as image:
                return image.convert("RGB")
        except _DECODE_ERRORS as error:
            raise UserError(f"cannot read image {path} ({one_line(error)}); replace or remove it") from error

    @functools.cached_property
    def _digest(self) -> str:
        digest = _digest_of(self.classes, self.labels)
        with ThreadPoolExecutor(STAT_THREADS) as pool:
            for part in pool.map(self._sizes, range(0, len(self), STAT_CHUNK)):
                digest.update(part)
        return digest.hexdigest()

    def _sizes(self, start: int) -> bytes:
        """Name and size of STAT_CHUNK files from `start` on."""
        folder, parts = os.fsencode(self.folder), []
        for file in self._files[start : start + STAT_CHUNK].tolist():
            path = os.path.join(folder, file)
            try:
                parts.append(b"%s\0%d\0" % (file, os.stat(path).st_size))
            except OSError as error:
                name = os.fsdecode(path)
                raise UserError(f"cannot read image {name} ({one_line(error)}); replace or remove it") from error
        return b"".join(parts)

    def digest(self) -> str:
        """Hex digest of class names, labels, file names and file sizes."""
        return self._digest


class ArraySource:
    """Images held in one uint8 array [N, H, W, 3]."""

    def __init__(self, images: np.ndarray, labels: Labels, classes: list[str]) -> None:
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or len(images) != len(labels):
            raise ValueError(f"not uint8 [N, H, W, 3] and N labels: {images.dtype} {images.shape}, {len(labels)}")
        self.images = np.ascontiguousarray(images)
        self.labels = np.asarray(labels, dtype=np.int64)
        self.classes = classes

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Image.Image:
        """The RGB image at `index`."""
        return Image.fromarray(self.images[index])

    @functools.cached_property
    def _digest(self) -> str:
        digest = _digest_of(self.classes, self.labels)
        digest.update(repr(self.images.shape).encode())
        digest.update(self.images.data)
        return digest.hexdigest()

    def digest(self) -> str:
        """Hex digest of class names, labels and pixels."""
        return self._digest


def _digest_of(classes: Iterable[str], labels: np.ndarray) -> hashlib._Hash:
    digest = hashlib.sha256("\0".join(classes).encode("utf-8", "surrogateescape"))
    digest.update(labels.astype("<i8").tobytes())
    return digest


def one_line(error: BaseException) -> str:
    """The first line of an error's text, or its type when it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def class_folders(
    directory: Path, split: str, classes: int | None = None, held_out: Sequence[str] = ("test", "val")
) -> FileSource:
    """Open a split kept as `<directory>/train/<class>/*.jpg` and `<directory>/test/<class>/*.jpg`.

    Classes are the class folders by sorted name, images are found at any depth below them, by sorted path; hidden and
    other files are ignored. The first of `held_out` that is there is the test split. Raises UserError when a folder is
    missing, a class is empty, the splits differ in classes, or there are not `classes` of them.
    """
    train, test = directory / "train", _held_out(directory, held_out)
    if not train.is_dir():
        raise MissingData(f"{train} is missing; put one folder of training images per class there, or set data.root")
    names, others = _class_names(train), _class_names(test)
    if names != others:
        odd = min(set(names) ^ set(others))
        where = train if odd in names else test
        raise UserError(f"{train} and {test} differ in classes: {odd!r} is only in {where}; give both the same folders")
    if classes is not None:
        check_count(train, names, classes)
    return labelled_folders(train if split == "train" else test, names)


def check_count(train: Path, names: list[str], classes: int) -> None:
    """Raise UserError unless the class folders `names` of `train` are `classes` in number."""
    if len(names) != classes:
        raise UserError(f"{train} holds {len(names)} classes, not {classes}; for other classes set data.name=folder")


def labelled_folders(folder: Path, classes: list[str]) -> FileSource:
    """The images of `<folder>/<class>/`, at any depth, labelled by the place of their class in `classes`."""
    files: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = image_files(folder / name)
        if not found:
            raise UserError(f"{folder / name} holds no images; put some there or remove the folder from all splits")
        files += [os.path.join(name, file) for file in found]
        labels += [label] * len(found)
    return FileSource(folder, files, labels, classes)


def image_files(folder: Path) -> list[str]:
    """Paths of the image files below `folder`, relative to it and sorted; hidden files and folders are left out."""
    return sorted(_walk(folder))


def holds_images(folder: Path) -> bool:
    """Whether there is an image file below `folder`."""
    return folder.is_dir() and any(True for _ in _walk(folder))


def _walk(folder: Path) -> Iterator[str]:
    def fail(error: OSError) -> None:
        raise UserError(f"cannot list {folder} ({one_line(error)}); check its permissions") from error

    for place, folders, names in os.walk(folder, followlinks=True, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inner = os.path.relpath(place, folder)
        for name in names:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in EXTENSIONS:
                yield name if inner == "." else os.path.join(inner, name)


def class_names(directory: Path) -> list[str]:
    """The classes of `<directory>/train`, sorted. Raises UserError when the folder is missing or has fewer than 2."""
    train = directory / "train"
    names = _class_names(train)
    if len(names) < 2:
        raise UserError(f"{train} holds one class, {names[0]!r}, and nothing can be learnt; put two or more there")
    return names


def _class_names(folder: Path) -> list[str]:
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if not entry.name.startswith(".") and entry.is_dir())
    except OSError as error:
        raise UserError(
            f"cannot list {folder} ({one_line(error)}); put one folder per class there, or set data.root"
        ) from error
    if not names:
        raise UserError(f"{folder} holds no class folders; put one folder of images per class there, or set data.root")
    return names


def _held_out(directory: Path, names: Sequence[str]) -> Path:
    for name in names:
        if (directory / name).is_dir():
            return directory / name
    choice = " or ".join(str(directory / name) for name in names)
    raise UserError(f"{choice} is missing; put one folder of test images per class there, or set data.root")
