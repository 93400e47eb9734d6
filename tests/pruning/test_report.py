"""layers.csv and the table."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn

from utils.masks import Masks
from utils.pruning.report import layer_table, write_layers_csv
from utils.system.errors import UserError


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 7, 3)
        self.norm = nn.BatchNorm2d(7)
        self.fc = nn.Linear(7, 3)
        self.scale = nn.Parameter(torch.ones(()))


@pytest.fixture
def masks() -> Masks:
    conv = torch.zeros(7, 3, 3, 3, dtype=torch.bool)
    conv.view(-1)[:10] = True
    return Masks({"conv.weight": conv, "fc.weight": torch.zeros(3, 7, dtype=torch.bool)})


def test_one_row_per_parameter(tmp_path: Path, masks: Masks) -> None:
    model = Small()
    path = tmp_path / "level_00" / "layers.csv"
    write_layers_csv(path, model, masks)
    table = pd.read_csv(path, float_precision="round_trip")
    assert list(table.columns) == ["name", "shape", "prunable", "numel", "kept", "density", "dead"]
    assert list(table.name) == [name for name, _ in model.named_parameters()]
    rows = table.set_index("name")
    assert tuple(rows.loc["conv.weight"]) == ("7x3x3x3", True, 189, 10, 10 / 189, False)
    assert tuple(rows.loc["fc.weight"]) == ("3x7", True, 21, 0, 0.0, True)
    assert tuple(rows.loc["norm.weight"]) == ("7", False, 7, 7, 1.0, False)
    assert tuple(rows.loc["scale"]) == ("scalar", False, 1, 1, 1.0, False)
    assert table.numel.sum() == sum(p.numel() for p in model.parameters())
    assert [p.name for p in path.parent.iterdir()] == ["layers.csv"]


def test_densities_are_in_full_precision(tmp_path: Path, masks: Masks) -> None:
    path = tmp_path / "layers.csv"
    write_layers_csv(path, Small(), masks)
    assert f",10,{10 / 189!r},False\n" in path.read_text()


def test_a_layer_outside_the_masks_is_not_prunable(tmp_path: Path, masks: Masks) -> None:
    path = tmp_path / "layers.csv"
    write_layers_csv(path, Small(), Masks({"conv.weight": masks["conv.weight"]}))
    rows = pd.read_csv(path, float_precision="round_trip").set_index("name")
    assert tuple(rows.loc["fc.weight"]) == ("3x7", False, 21, 21, 1.0, False)


def test_the_table_shows_prunable_layers_dead_ones_and_the_total(masks: Masks) -> None:
    lines = layer_table(Small(), masks).splitlines()
    assert [line.split() for line in lines] == [
        ["parameter", "shape", "weights", "kept", "density"],
        ["conv.weight", "7x3x3x3", "189", "10", "0.0529"],
        ["fc.weight", "3x7", "21", "0", "0.0000", "dead"],
        ["total", "210", "10", "0.0476"],
    ]


def test_masks_of_another_model_are_refused(tmp_path: Path, masks: Masks) -> None:
    path = tmp_path / "layers.csv"
    with pytest.raises(UserError, match="not a prunable parameter"):
        write_layers_csv(path, nn.Linear(7, 3), masks)
    assert not path.exists()
