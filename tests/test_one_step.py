"""One optimizer step for every data set, model family and (in small) shipped experiment: 32 px, 8 images."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from utils import levels, structured_levels
from utils.params import Params
from utils.params.load import build
from utils.params.yaml_file import read_yaml
from utils.system.console import Console
from utils.system.distributed import World
from utils.system.registry import declared

ROOT = Path(__file__).resolve().parents[1]
CLASSES = {"cifar100": 100, "tiny_imagenet": 200, "imagenet": 1000, "folder": 3}
FAMILIES = [
    "cifar/resnet20",
    "cifar/resnet18",
    "cifar/vgg11_bn",
    "torchvision/resnet18",
    "torchvision/mobilenet_v3_small",
    "torchvision/shufflenet_v2_x0_5",
    "timm/test_vit",
    "timm/test_efficientnet",
]
SMALL = {
    "data.loader": "torchvision",
    "data.workers": 1,
    "data.val": 0,
    "data.image_size": 32,
    "data.eval_size": 32,
    "data.progressive_size": "none",
    "training.batch_size": 8,
    "training.epochs": 1,
    "training.precision": "float32",
    "training.ema": "none",
    "schedule.name": "constant",
}


def write_folders(root: Path, classes: int) -> None:
    """Nine or more images, at least one of each class, for training and for testing."""
    noise = np.random.default_rng(0)
    for split in ("train", "test"):
        for number in range(classes):
            folder = root / split / f"class_{number:04d}"
            folder.mkdir(parents=True)
            for copy in range(1 if classes > 8 else 3):
                pixels = noise.integers(0, 256, (36, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{copy}.jpg")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A data root where each data set lies as class folders."""
    base = tmp_path_factory.mktemp("data")
    for name in declared("dataset"):
        if name not in ("digits", "folder"):
            write_folders(base / name, CLASSES.get(name, 10))
    write_folders(base / "folder", CLASSES["folder"])
    return base


def one_step(params: Params) -> list[dict[str, str]]:
    driver = levels.Driver if params.structured.budget is None else structured_levels.StructuredDriver
    directory = driver(params, World(), torch.device("cpu"), Console(main=False)).run()
    with open(directory.levels_csv, encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def place(root: Path, name: str) -> str:
    return str(root / "folder") if name == "folder" else str(root)


@pytest.mark.parametrize("name", sorted(declared("dataset")))
def test_every_data_set(name: str, root: Path, tmp_path: Path) -> None:
    keys = {"data.name": name, "data.root": place(root, name), "run.root": str(tmp_path), "data.subset": 8}
    rows = one_step(build({**SMALL, **keys, "levels.densities": [0.5], "model.name": "cifar/resnet20"}))
    assert [float(row["target_density"]) for row in rows] == [1.0, 0.5]
    assert rows[0]["dataset"] == name


@pytest.mark.parametrize("name", FAMILIES)
def test_every_model_family(name: str, root: Path, tmp_path: Path) -> None:
    keys = {"data.name": "cifar10", "data.root": str(root), "run.root": str(tmp_path), "data.subset": 8}
    rows = one_step(build({**SMALL, **keys, "levels.densities": [0.5], "model.name": name}))
    assert int(rows[1]["kept_weights"]) == int(0.5 * int(rows[1]["prunable_weights"]) + 0.5)


def experiments() -> list[str]:
    overlays = {"levels", "pruning", "dynamic", "early", "training", "slurm", "recipe", "structured"}
    files = sorted((ROOT / "configs").rglob("*.yaml"))
    return [str(f.relative_to(ROOT)) for f in files if f.parent.name not in overlays]


@pytest.mark.parametrize("path", experiments())
def test_every_shipped_experiment(path: str, root: Path, tmp_path: Path) -> None:
    """Two levels of one step each, on a small network in place of the config's own."""
    given = read_yaml(ROOT / path)
    given.pop("schedule", None)  # milestones and warm-ups of real length; tests/test_configs.py validates them
    name = given["data"]["name"]
    method = {"levels.count": 2, "levels.rewind_step": "0it"} if given["levels"].get("rewind") == "wr" else {}
    if (count := given["levels"].get("count", "none")) != "none":
        method["levels.count"] = min(2, int(count))
    for section in ("pruning", "structured"):
        given.get(section, {}).pop("exclude", None)  # names of the config's own network
    keys = {"data.root": place(root, name), "run.root": str(tmp_path), "data.subset": 8}
    rows = one_step(build([given, {**SMALL, **keys, **method, "model.name": "cifar/resnet20"}]))
    assert rows
    assert all(row["final_test_acc"] for row in rows)
