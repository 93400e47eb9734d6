"""--run.plan=true: what it says, and that it refuses what the run refuses, writing nothing either way."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch

from harness_params import load
from utils import levels
from utils.estimate import describe
from utils.params import Params
from utils.params.load import build
from utils.structured_levels import StructuredDriver
from utils.system.console import Console
from utils.system.distributed import World
from utils.system.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
BASE = {
    "data.name": "digits",
    "data.loader": "device",
    "data.val": 0.1,
    "model.name": "cifar/resnet20",
    "training.batch_size": 64,
    "training.epochs": 3,
    "levels.densities": [0.5, 0.2],
}


STEP = {"pruning__moment": "step"}
EARLY = {"pruning__moment": "early"}
NO_NORM = {"model__name": "torchvision/squeezenet1_1", "data__image_size": 64}


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
    for keys in ({}, {"recipe__rescale__method": "sgd"}):
        assert "unknown until the data set is in" in describe(config(tmp_path, data__name="imagenet", **keys), World())


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
        ({**STEP, "pruning__step": "60it"}, r"pruning\.step=60it: training has only 60 steps"),
        ({**EARLY, "early__latest": "61it"}, r"early\.latest=61it: training has only 60 steps"),
        (
            {**EARLY, "early__trigger": "early_bird", **NO_NORM},
            r"early\.trigger=early_bird: the model has no BatchNorm",
        ),
        ({"dynamic__method": "rigl"}, r"dynamic\.every=100: leaves no update .* of 60 steps"),
        ({"dynamic__method": "set", "dynamic__every": 45}, r"dynamic\.every=45: leaves no update"),
        (
            {"dynamic__method": "set", "dynamic__every": 5, "levels__rewind": "wr", "levels__rewind_step": "41it"},
            r"levels\.rewind_step=41it: levels continue after the last update of dynamic\.method=set at step 40",
        ),
        ({"pruning__pattern": "2:4"}, r"pruning\.pattern=2:4"),
        ({"pruning__pattern": "2:4", "pruning__allocation": "erk"}, r"pruning\.allocation=erk"),
        ({"pruning__criterion_options": ["nothing=1"]}, r"pruning\.criterion_options"),
        ({"pruning__normalize": "lamp", "pruning__criterion": "grasp"}, r"pruning\.normalize=lamp"),
        (
            {"pruning__normalize": "lamp", "levels__start": 0.8, "levels__start_criterion": "grasp"},
            r"pruning\.normalize=lamp",
        ),
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


@pytest.mark.parametrize(
    ("keys", "ends"),
    [
        ({**STEP, "pruning__step": "59it"}, ["initial weights at density 1, pruned while training"] * 2),
        (EARLY, ["initial weights at density 1, pruned while training"] * 2),
        (
            {"pruning__moment": "init", "dynamic__method": "gmp", "dynamic__every": 5, "dynamic__initial_density": 0.8},
            ["initial weights at density 0.8, pruned while training"] * 2,
        ),
        ({"pruning__moment": "init", "dynamic__method": "set", "dynamic__every": 44}, ["initial weights"] * 2),
        # The first step may itself be an update.
        (
            {"dynamic__method": "set", "dynamic__start": "44it"},
            ["initial weights", "level 0, rewind lrr", "level 1, rewind lrr"],
        ),
        ({"levels__start": 0.5}, ["initial weights", "level 0, rewind lrr"]),
    ],
)
def test_what_a_level_starts_from(tmp_path: Path, keys: dict, ends: list[str]) -> None:
    lines = describe(config(tmp_path, **keys), World()).splitlines()
    heading = next(line for line in lines if line.endswith("starts from"))
    column = heading.index("starts from")
    assert [line[column:] for line in lines if line.strip()[:1].isdigit()] == ends


OVERLAYS = sorted(
    path for folder in ("pruning", "dynamic", "early") for path in (ROOT / "configs" / folder).glob("*.yaml")
)


@pytest.mark.parametrize("overlay", OVERLAYS, ids=[path.stem for path in OVERLAYS])
def test_every_method_has_a_plan_before_its_data_is_there(
    overlay: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command of the overlay's comment with --run.plan=true, in this process."""
    monkeypatch.chdir(ROOT)
    name = overlay.relative_to(ROOT).as_posix()
    comment = overlay.read_text(encoding="utf-8").replace("\\\n#", "")
    shown = next(line for line in comment.splitlines() if "harness.py" in line and name in line)
    roots = [f"--data.root={tmp_path / 'data'}", f"--run.root={tmp_path / 'runs'}", "--run.plan=true"]
    text = describe(load([*shlex.split(shown.partition("harness.py")[2]), *roots]), World())
    assert "starts from" in text
    assert "unknown until the data set is in" in text
    assert list(tmp_path.iterdir()) == []


STRUCTURED = {"structured__budget": "macs", "levels__densities": []}


def structured_table(text: str) -> list[list[str]]:
    return [line.split(maxsplit=4) for line in text.splitlines() if line.strip()[:1].isdigit()]


def test_a_structured_run_tells_shares_epochs_and_sources(tmp_path: Path) -> None:
    keys = {**STRUCTURED, "structured__keep": [0.7, 0.5], "structured__scratch": "b", "pruning__moment": "init"}
    gates = {"structured__criterion": "gates", "structured__fresh": True, "structured__gate_epochs": 4}
    text = describe(config(tmp_path, **keys, **gates), World())
    # 1,294 training images in batches of 64: 20 steps. Scratch-B: 3 / 0.7 and 3 / 0.5 epochs.
    assert structured_table(text) == [
        ["0", "1.000000", "4", "80", "initial weights, gates alone"],
        ["1", "0.700000", "4", "80", "fresh weights, channels by level 0"],
        ["2", "0.500000", "6", "120", "fresh weights, channels by level 0"],
    ]
    assert "272,474 parameters, 10,203,776 MACs" in text  # a quarter of its 40.8 M on 32 px
    assert "448 channels in 12 groups that may be pruned" in text
    keys = {**STRUCTURED, "structured__keep": [0.5], "structured__tock_epochs": 2, "structured__gate_epochs": 1}
    text = describe(
        config(tmp_path, **keys, pruning__moment="ticktock", structured__criterion="gates", data__name="imagenet"),
        World(),
    )
    assert structured_table(text) == [
        ["0", "1.000000", "3", "?", "initial weights"],
        ["1", "1.000000", "1", "?", "level 0, gates alone"],
        ["2", "0.500000", "2", "?", "level 1, pruned; gates and weights"],
        ["3", "0.500000", "3", "?", "level 2"],
    ]
    assert list(tmp_path.iterdir()) == []


def test_a_plan_of_a_network_that_cannot_be_made_smaller_is_refused(tmp_path: Path) -> None:
    odd = {"model__name": "torchvision/shufflenet_v2_x0_5", "data__image_size": 64, "structured__keep": [0.5]}
    with pytest.raises(UserError, match=r"structured pruning of torchvision/shufflenet_v2_x0_5: its channels cannot"):
        describe(config(tmp_path, **STRUCTURED, **odd), World())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"pruning__exclude": ["nosuch*"]}, r"pruning\.exclude: 'nosuch\*'"),
        ({"pruning__pattern": "2:4"}, r"pruning\.pattern=2:4"),
    ],
)
def test_single_weights_of_a_structured_plan_are_checked(tmp_path: Path, keys: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        describe(config(tmp_path, **STRUCTURED, structured__keep=[0.5], pruning__density=0.3, **keys), World())


GATES = {"structured__criterion": "gates", "pruning__moment": "init", "structured__gate_epochs": 1}
TURNS = {**GATES, "pruning__moment": "ticktock", "structured__tock_epochs": 2}
LATE = {**EARLY, "structured__criterion": "l1"}
SMOOTH = {"recipe__smoothing__schedule": "linear"}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({**GATES, **SMOOTH, "recipe__smoothing__end": "61it"}, r"recipe\.smoothing\.end=61it: training has only 60"),
        (
            {**GATES, **SMOOTH, "recipe__smoothing__amount": 0.95, "recipe__smoothing__convention": "others"},
            r"recipe\.smoothing\.amount=0\.95",
        ),
        ({**GATES, "schedule__warmup": "61it"}, r"schedule\.warmup=61it"),
        ({**TURNS, "schedule__warmup": "41it"}, r"schedule\.warmup=41it is 41 steps but training has 40"),
        ({**LATE, "early__latest": "61it"}, r"early\.latest=61it: training has only 60 steps"),
    ],
)
def test_a_structured_plan_refuses_what_its_run_refuses(tmp_path: Path, keys: dict, message: str) -> None:
    """Before the levels that train before the one that cannot."""
    params = config(tmp_path, **STRUCTURED, structured__keep=[0.5], **keys)
    for refuse in (
        lambda: describe(params, World()),
        lambda: StructuredDriver(params, World(), torch.device("cpu"), Console(False)),
    ):
        with pytest.raises(UserError, match=message):
            refuse()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "keys",
    [
        {**GATES, "schedule__warmup": "30it"},  # 20 steps of gates have no warmup
        {**GATES, **SMOOTH, "recipe__smoothing__end": "30it"},
        {**GATES, "structured__scratch": "b", "schedule__warmup": "50it", "levels__epochs": [1, 2]},
        {**LATE, "early__latest": "50it", "levels__epochs": [3, 1]},
    ],
    ids=["gates", "smoothing", "stretched", "early"],
)
def test_a_structured_plan_allows_what_its_run_can_do(tmp_path: Path, keys: dict) -> None:
    params = config(tmp_path, **STRUCTURED, structured__keep=[0.5], **keys)
    assert "starts from" in describe(params, World())
    StructuredDriver(params, World(), torch.device("cpu"), Console(False)).loaders.close()
