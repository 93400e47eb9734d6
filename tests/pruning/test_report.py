"""layers.csv and the table."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn

from utils.masks import Masks
from utils.pruning.harness import Round
from utils.pruning.report import (
    inspect_text,
    layer_rows,
    layer_table,
    mask_rows,
    mask_table,
    rounds_table,
    write_layers_csv,
    write_rounds_csv,
)
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
    assert list(table.columns) == [
        "name",
        "shape",
        "prunable",
        "numel",
        "kept",
        "density",
        "dead",
        "effective",
        "width",
    ]
    assert table.effective.isna().all()
    table = table.drop(columns=["effective", "width"])
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
    assert f",10,{10 / 189!r},False,,1\n" in path.read_text()


def test_a_layer_outside_the_masks_is_not_prunable(tmp_path: Path, masks: Masks) -> None:
    path = tmp_path / "layers.csv"
    write_layers_csv(path, Small(), Masks({"conv.weight": masks["conv.weight"]}))
    rows = pd.read_csv(path, float_precision="round_trip").set_index("name").drop(columns=["effective", "width"])
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


def test_effective_weights_stand_beside_the_kept_ones(tmp_path: Path, masks: Masks) -> None:
    path = tmp_path / "layers.csv"
    write_layers_csv(path, Small(), masks, {"conv.weight": 4})
    written = path.read_text().splitlines()
    assert f"conv.weight,7x3x3x3,True,189,10,{10 / 189!r},False,4,1" in written
    assert "fc.weight,3x7,True,21,0,0.0,True,,0" in written  # not known
    assert "conv.bias,7,False,7,7,1.0,False,," in written
    lines = layer_table(Small(), masks, {"conv.weight": 4, "fc.weight": 0}).splitlines()
    assert [line.split() for line in lines] == [
        ["parameter", "shape", "weights", "kept", "density", "effective", "eff.", "density"],
        ["conv.weight", "7x3x3x3", "189", "10", "0.0529", "4", "0.0212"],
        ["fc.weight", "3x7", "21", "0", "0.0000", "0", "0.0000", "dead"],
        ["total", "210", "10", "0.0476", "4", "0.0190"],
    ]
    assert lines[3].index("0.0190") + 6 == lines[0].index("eff. density") + len("eff. density")


def test_effective_totals_stand_only_when_all_are_known(masks: Masks) -> None:
    lines = layer_table(Small(), masks, {"conv.weight": 4}).splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["conv.weight", "7x3x3x3", "189", "10", "0.0529", "4", "0.0212"],
        ["fc.weight", "3x7", "21", "0", "0.0000", "dead"],
        ["total", "210", "10", "0.0476"],
    ]


@pytest.mark.parametrize("effective", [{"conv.weight": 11}, {"conv.weight": -1}, {"norm.weight": 1}, {"no.weight": 0}])
def test_effective_counts_that_cannot_be(masks: Masks, effective: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="effective weights of"):
        layer_rows(Small(), masks, effective)
    with pytest.raises(ValueError, match="effective weights of"):
        mask_rows(masks, effective)


def test_tables_without_a_model(masks: Masks) -> None:
    effective = {"conv.weight": 4, "fc.weight": 0}
    model = Small()
    assert mask_rows(masks, effective) == [row for row in layer_rows(model, masks, effective) if row.prunable]
    assert mask_table(masks, effective) == layer_table(model, masks, effective)
    assert mask_table(masks) == layer_table(model, masks)
    assert mask_table(Masks({})).splitlines()[-1].split() == ["total", "0", "0", "1.0000"]


def test_rounds(tmp_path: Path) -> None:
    rounds = [Round(1 / 3, 0.3333), Round(0.1, 0.1)]
    lines = rounds_table(rounds).splitlines()
    assert [line.split() for line in lines] == [
        ["round", "requested", "reached"],
        ["1", "0.333333", "0.333300"],
        ["2", "0.100000", "0.100000"],
    ]
    write_rounds_csv(tmp_path / "level_00" / "rounds.csv", rounds)
    text = (tmp_path / "level_00" / "rounds.csv").read_text()
    assert text == f"round,requested,reached\n1,{1 / 3!r},0.3333\n2,0.1,0.1\n"


def test_what_a_mask_file_holds(tmp_path: Path, masks: Masks) -> None:
    path = tmp_path / "m.safetensors"
    Masks({"conv.weight": masks["conv.weight"]}).save(path, source="abc of level 1", form="zeros in the weights")
    facts, _, table = inspect_text(path).partition("\n\n")
    found = {line[:11].strip(): line[11:].strip() for line in facts.splitlines()}
    assert found == {
        "file": str(path),
        "kind": "mask file",
        "form": "zeros in the weights",
        "format": "sieve-masks-1",
        "source": "abc of level 1",
        "digest": Masks({"conv.weight": masks["conv.weight"]}).digest,
        "kept": "10",
        "total": "189",
        "density": f"{10 / 189:.6f}",
        "dead layers": "0",
    }
    assert table.splitlines()[-1].split() == ["total", "189", "10", "0.0529"]
    assert "not masked by the file  fc.weight" in inspect_text(path, Small())
    masks.save(path)
    assert "dead layers  1: fc.weight" in inspect_text(path, Small())
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"m.safetensors: not a whole"):
        inspect_text(path)


def test_what_other_files_hold(tmp_path: Path, masks: Masks) -> None:
    path = tmp_path / "w.pt"
    torch.save({f"module.{name}_mask": mask.float() for name, mask in masks.items()}, path)
    text = inspect_text(path)
    assert "*_mask of torch.nn.utils.prune" in text
    assert masks.digest in text
    assert text.endswith(mask_table(masks))
    with pytest.raises(UserError, match="not a prunable parameter"):
        inspect_text(path, nn.Sequential(nn.Linear(2, 2)))
