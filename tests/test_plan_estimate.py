"""--run.plan=true: what it says, and that it refuses what the run refuses, writing nothing either way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from utils import levels
from utils.estimate import describe
from utils.params import Params
from utils.params.load import build
from utils.system.console import Console
from utils.system.distributed import World
from utils.system.errors import UserError

BASE = {
    "data.name": "digits",
    "data.loader": "device",
    "data.val": 0.1,
    "model.name": "cifar/resnet20",
    "training.batch_size": 64,
    "training.epochs": 3,
    "levels.densities": [0.5, 0.2],
}


def config(tmp_path: Path, **keys: object) -> Params:
    given = {key.replace("__", "."): value for key, value in keys.items()}
    return build({**BASE, "run.root": str(tmp_path / "runs"), "data.root": str(tmp_path / "data"), **given})


def test_levels_steps_and_directory(tmp_path: Path) -> None:
    text = describe(config(tmp_path), World(size=2, local_size=2))
    lines = text.splitlines()
    assert str(tmp_path / "runs" / "sieve-") in lines[0]
    table = [line.split() for line in lines if line.strip()[:1].isdigit()]
    assert [row[:5] for row in table] == [
        ["0", "1.000000", "270,896", "3", "60"],
        ["1", "0.500000", "135,448", "3", "60"],
        ["2", "0.200000", "54,179", "3", "60"],
    ]
    assert "180 at most (20 per epoch, 2 rank(s))" in text  # 1,294 of 1,438 images in batches of 64
    assert list(tmp_path.iterdir()) == []


def test_data_that_is_not_there_leaves_steps_open(tmp_path: Path) -> None:
    assert "unknown until the data set is in" in describe(config(tmp_path, data__name="imagenet"), World())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"data__subset": 100000}, r"data\.subset"),
        ({"data__val": 0.99999}, r"data\.val"),
        ({"model__pretrained": "nope.safetensors"}, r"model\.pretrained: nope\.safetensors: no such file"),
        ({"model__name": "torchvision/resnet1"}, r"model\.name: unknown torchvision/resnet1"),
        ({"pruning__exclude": ["nothing*"]}, r"pruning\.exclude: 'nothing\*'"),
        ({"pruning__exclude": ["*"]}, r"pruning\.exclude"),
        ({"pruning__layer_densities": ["nothing*=0.5"]}, r"pruning\.layer_densities"),
        ({"pruning__layer_densities": ["*=0.9"]}, r"pruning\.layer_densities"),
        ({"levels__rewind": "wr", "levels__rewind_step": "99it"}, r"levels\.rewind_step=99it"),
        ({"schedule__warmup": "90it"}, r"schedule\.warmup"),
        ({"levels__rewind": "none", "levels__epochs": [0, 2, 2]}, r"levels\.finetune_lr: level 0 trains 0 epochs"),
        ({"model__name": "timm/vit_tiny_patch16_224", "data__eval_size": 48}, r"data\.eval_size: timm/vit_tiny"),
        ({"model__name": "cifar/vgg11_bn", "data__image_size": 16}, r"data\.image_size: cifar/vgg11_bn"),
    ],
)
def test_the_plan_refuses_what_the_run_refuses(tmp_path: Path, keys: dict, message: str) -> None:
    for refuse in (
        lambda: describe(config(tmp_path, **keys), World()),
        lambda: levels.Driver(config(tmp_path, **keys), World(), torch.device("cpu"), Console(False)),
    ):
        with pytest.raises(UserError, match=message) as caught:
            refuse()
        assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_batch_that_does_not_divide_by_the_ranks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"training\.batch_size"):
        describe(config(tmp_path), World(size=3, local_size=3))
