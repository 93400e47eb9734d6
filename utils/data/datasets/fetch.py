"""Downloads through torchvision: at most one process at a time, whole or absent, with one clear line on failure."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from utils.data.datasets.sources import MissingData, one_line
from utils.data.lock import locked
from utils.system.errors import UserError

T = TypeVar("T")


@contextlib.contextmanager
def downloading(directory: Path, name: str) -> Iterator[None]:
    """Hold the folder's download lock; network and disk errors become one UserError, prints go to stderr."""
    try:
        with locked(directory / ".download.lock"), contextlib.redirect_stdout(sys.stderr):
            yield
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"cannot download {name} to {directory} ({one_line(error)}); put its files there by hand, as "
            f"torchvision.datasets.{name} reads them or as class folders {directory}/train/<class> and test/<class>"
        ) from error


def fetched(read: Callable[[bool], T], directory: Path, name: str, download: bool) -> T:
    """`read(False)` when torchvision's files are there and whole, else `read(True)`, which downloads them first."""
    try:
        return read(False)
    except RuntimeError as error:  # what torchvision raises for missing files and for files that fail their checksum
        if not download:
            raise MissingData(
                f"no whole copy of {name} in {directory}; set data.download=true or data.root, or put class folders "
                "there as train/<class>/ and test/<class>/"
            ) from error
    with downloading(directory, name):
        return read(True)


def fetch_folder(get: Callable[[Path], object], directory: Path, folder: str, name: str) -> None:
    """Make `<directory>/<folder>` by `get(place)`, which makes `place/<folder>`; when interrupted there is none."""
    with downloading(directory, name):
        if (directory / folder).exists():  # another process was quicker
            return
        partial = directory / ".partial"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir()
            get(partial)
            os.replace(partial / folder, directory / folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
