"""Small runs on digits, as the tests of whole levels make them."""

from __future__ import annotations

import csv
from pathlib import Path

import torch

from utils import files, levels
from utils.params import Params
from utils.params.load import build
from utils.system.console import Console
from utils.system.distributed import World
from utils.system.rundir import RunDir


def config(root: Path, epochs: int, **keys: object) -> Params:
    """The config of a run of `epochs` epochs of four steps; `__` in keys stands for the dot."""
    base = {
        "run.root": str(root),
        "data.name": "digits",
        "data.loader": "device",
        "data.subset": 160,
        "data.val": 0.0,
        "model.name": "cifar/resnet20",
        "training.epochs": epochs,
        "training.batch_size": 40,
        "training.precision": "float32",
        "optimizer.lr": 0.05,
    }
    return build({**base, **{key.replace("__", "."): value for key, value in keys.items()}})


def run(params: Params) -> RunDir:
    """Run all levels in this process."""
    return levels.Driver(params, World(), torch.device("cpu"), Console(main=False)).run()


def rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV."""
    with open(path, encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def row(directory: RunDir, level: int = 0) -> dict[str, str]:
    """The row of a level in levels.csv."""
    return rows(directory.levels_csv)[level]


TIMES = ("images_per_second", "data_wait", "seconds")
"""Columns that differ between two runs of the same bits."""


def everything(directory: RunDir) -> dict[str, object]:
    """All a run left that must not depend on when it was stopped: files by name, tensors and rows by value."""
    found: dict[str, object] = {}
    for path in sorted(directory.path.rglob("*")):
        name = str(path.relative_to(directory.path))
        if path.suffix == ".safetensors":
            found |= {f"{name}/{key}": files.digest({key: t}) for key, t in files.load_weights(path).items()}
        elif path.name in ("epochs.csv", "levels.csv"):
            found[name] = [{key: cell for key, cell in row.items() if key not in TIMES} for row in rows(path)]
        elif path.name in ("layers.csv", "rounds.csv"):
            found[name] = path.read_text(encoding="utf-8")
        elif path.is_file():
            found[name] = "there"
    return found
