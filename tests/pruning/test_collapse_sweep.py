"""What pruning at initialisation empties and cuts: exact allocations, SynFlow, SNIP and magnitude on whole networks."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn

from benchmarks import collapse
from utils import models
from utils.masks import Masks
from utils.params.pruning import Pruning
from utils.pruning import PruningHarness, paths
from utils.system.errors import UserError

DENSITIES = (0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001)
SHAPE = (3, 32, 32)


def network(name: str) -> nn.Module:
    return models.build(name, 1000 if name == "torchvision/resnet50" else 10)


def synflow(model: nn.Module, density: float) -> Masks:
    section = Pruning(criterion="synflow", density=density)
    return PruningHarness(section, seed=0, input_shape=SHAPE).prune(model, None, density).masks


def emptied(masks: Masks) -> list[str]:
    return [name for name, mask in masks.items() if not mask.any()]


def reaches(masks: Masks) -> bool:
    """Whether a chain of convolutions and linear layers, each fed by the one before, links any input to any output.

    Channel by channel, without running the network: an output is reached when it keeps a weight of a reached input.
    """
    alive = torch.ones(3, dtype=torch.bool)
    for mask in masks.values():
        alive = mask.reshape(len(mask), len(alive), -1).any(dim=2)[:, alive].any(dim=1)
    return bool(alive.any())


@pytest.mark.parametrize("allocation", ["uniform", "erk", "balanced"])
@pytest.mark.parametrize(
    "name",
    ["cifar/resnet18", "cifar/vgg16_bn", pytest.param("torchvision/resnet50", marks=pytest.mark.slow)],
)
def test_exact_allocations_empty_no_layer(name: str, allocation: str) -> None:
    model = network(name)
    total = sum(weight.numel() for weight in Masks.dense(model).values())
    section = Pruning(criterion="random", allocation=allocation)
    harness = PruningHarness(section, seed=0)
    start = harness.start(model)
    scores = harness.score(model, start)
    for density in DENSITIES:
        masks = harness.select(scores, start, density)
        assert masks.kept == int(density * total + 0.5)
        assert emptied(masks) == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("name", "density", "shortcuts"),
    [
        ("cifar/resnet18", 0.1, None),  # which ones depends on the seed
        ("cifar/resnet18", 0.05, 3),
        ("cifar/resnet18", 0.001, 3),
        ("torchvision/resnet50", 0.01, 4),
    ],
)
def test_synflow_empties_shortcuts_alone_and_never_cuts(name: str, density: float, shortcuts: int | None) -> None:
    model = network(name)
    masks = synflow(model, density)
    empty = emptied(masks)
    assert all(name.endswith("downsample.0.weight") for name in empty)
    assert len(empty) == shortcuts or (shortcuts is None and 1 <= len(empty) <= 3)
    found = paths.effective(model, masks, SHAPE)
    assert found.connected
    assert found.density > 0.9 * masks.density


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("density", [0.1, 0.001])
def test_synflow_empties_no_layer_of_a_chain(density: float) -> None:
    model = network("cifar/vgg16_bn")
    masks = synflow(model, density)
    assert emptied(masks) == []
    assert reaches(masks)
    assert paths.effective(model, masks, SHAPE).connected


def test_one_shot_magnitude_empties_the_classifier_of_resnet18_and_the_run_stops() -> None:
    # Its weights are the smallest of all at initialisation.
    model = network("cifar/resnet18")
    harness = PruningHarness(Pruning(criterion="magnitude"), seed=0)
    scores = harness.score(model, harness.start(model))
    cuts = {}
    for density in (0.2, 0.1, 0.05, 0.01):
        masks = harness.select(scores, harness.start(model), density)
        found = paths.effective(model, masks, SHAPE)
        cuts[density] = not found.connected
        if cuts[density]:
            assert "fc.weight" in emptied(masks)
            with pytest.raises(UserError, match=r"no path is left.*fc\.weight"):
                paths.check_connected(found, masks)
    assert cuts == {0.2: False, 0.1: False, 0.05: True, 0.01: True}


def test_snip_empties_late_layers_of_resnet18() -> None:
    model, net = network("cifar/resnet18"), collapse.NETWORKS["cifar/resnet18"]
    empty, cut = {}, {}
    for density, masks in collapse.masks_of(model, net, "SNIP", (0.05, 0.01, 0.001), images=100):
        empty[density] = emptied(masks)
        cut[density] = not paths.effective(model, masks, SHAPE).connected
    assert empty[0.05] == []
    assert empty[0.01]
    assert all(name.startswith(("layer3.", "layer4.")) for name in empty[0.01] + empty[0.001])
    assert cut == {0.05: False, 0.01: False, 0.001: True}


def test_a_chain_may_be_cut_without_an_empty_layer() -> None:
    """Random uniform masks of VGG-16 at density 0.001: the paths' own search agrees with one channel by channel."""
    model = network("cifar/vgg16_bn")
    harness = PruningHarness(Pruning(criterion="random", allocation="uniform"), seed=0)
    scores = harness.score(model, harness.start(model))
    for density, linked in ((0.1, True), (0.005, True), (0.001, False)):
        masks = harness.select(scores, harness.start(model), density)
        assert emptied(masks) == []
        assert reaches(masks) == linked == paths.effective(model, masks, SHAPE).connected


def test_the_report_measures_each_row_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--networks", "cifar/resnet18", "--methods", "magnitude", "--out", str(tmp_path), "--densities"]
    assert collapse.main([*words, "0.5", "0.05"]) == 0
    frame = pd.read_csv(tmp_path / "collapse.csv", keep_default_na=False)
    assert frame["density"].tolist() == [0.5, 0.05]
    assert frame["empty"].tolist() == ["", "fc.weight"]
    assert frame["connected"].tolist() == [True, False]
    assert frame["kept"].tolist() == [int(d * n + 0.5) for d, n in zip(frame["density"], frame["total"], strict=True)]
    asked: list[float] = []

    def measure(model: nn.Module, net: collapse.Network, masks: Masks) -> dict[str, object]:
        asked.append(masks.density)
        return dict.fromkeys(["kept", "total", "effective_density", "connected", "empty_layers", "layers", "empty"], 0)

    monkeypatch.setattr(collapse, "measure", measure)
    assert collapse.main([*words, "0.5", "0.05", "0.01"]) == 0
    assert asked == [pytest.approx(0.01, rel=1e-4)]
    text = (tmp_path / "collapse.md").read_text()
    assert "| cifar/resnet18 | magnitude | 0 (0.5) | 1 (0) **cut** |" in text
