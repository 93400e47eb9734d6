"""Activations by hand."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from utils.analysis.activations import activation_rows, plot_activations
from utils.system.errors import UserError


class Twice(nn.Module):
    """One ReLU that runs twice, and a channel that is dead the first time."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.last = nn.GELU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(x * torch.tensor([1.0, -1.0, 1.0])[:, None, None])
        return self.last(self.relu(x - 0.5))


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(size, 3, 4, 4, generator=generator) for size in (5, 2, 0)]
    return [(image, torch.zeros(len(image), dtype=torch.int64)) for image in images]


def test_rows_by_hand() -> None:
    rows = activation_rows(Twice().eval(), batches(), near=0.2)
    assert [(row["layer"], row["call"], row["kind"]) for row in rows] == [
        ("relu", 0, "ReLU"), ("relu", 1, "ReLU"), ("last", 0, "GELU"),
    ]  # fmt: skip
    x = torch.cat([images for images, _ in batches()]).numpy().astype(np.float64)
    first = x * np.array([1.0, 0.0, 1.0])[:, None, None]
    second = np.maximum(first - 0.5, 0)
    for row, values in zip(rows, (first, second), strict=False):
        assert row["values"] == values.size == 7 * 3 * 16
        assert row["channels"] == 3
        assert row["near_zero"] == pytest.approx((np.abs(values) <= 0.2).mean())
        assert row["dead_channels"] == 1
        assert row["mean"] == pytest.approx(values.mean(), rel=1e-6)
        assert row["sd"] == pytest.approx(values.std(), rel=1e-6)


def test_the_network_is_left_alone() -> None:
    model = Twice().eval()
    activation_rows(model, batches())
    assert not any(module._forward_hooks for module in model.modules())


def test_nothing_to_look_at() -> None:
    with pytest.raises(UserError, match="has no activation modules"):
        activation_rows(nn.Sequential(nn.Linear(2, 2)), batches())
    with pytest.raises(UserError, match="no images"):
        activation_rows(Twice(), [])


def test_a_plot_is_written(tmp_path: Path) -> None:
    out = plot_activations(activation_rows(Twice(), batches()), tmp_path / "a.png")
    assert out.read_bytes().startswith(b"\x89PNG")


def test_a_table_is_a_csv_of_numbers(tmp_path: Path) -> None:
    from utils.analysis.activations import COLUMNS
    from utils.analysis.commands import _write

    _write(tmp_path / "a.csv", COLUMNS, activation_rows(Twice(), batches()))
    with open(tmp_path / "a.csv", encoding="utf-8") as handle:
        assert [row["dead_channels"] for row in csv.DictReader(handle)] == ["1", "1", "1"]
