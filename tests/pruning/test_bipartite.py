"""Weights as graphs of channels: by hand and by loops over the modules' own connections."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from utils.masks import Masks
from utils.pruning.bipartite import Channels, channels


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(4, 6, (3, 2), bias=False)
        self.grouped = nn.Conv2d(6, 4, 3, groups=2, bias=False)
        self.depthwise = nn.Conv2d(4, 8, 3, groups=4, bias=False)
        self.up = nn.ConvTranspose2d(8, 6, 2, groups=2, bias=False)
        self.line = nn.Conv1d(6, 5, 4, bias=False)
        self.linear = nn.Linear(5, 3, bias=False)
        self.attention = nn.MultiheadAttention(4, 2, bias=False)


EXPECTED = {  # graphs, inputs, outputs, kernel
    "plain.weight": (1, 4, 6, 6),
    "grouped.weight": (2, 3, 2, 9),
    "depthwise.weight": (4, 1, 2, 9),
    "up.weight": (2, 4, 3, 4),
    "line.weight": (1, 6, 5, 4),
    "linear.weight": (1, 5, 3, 1),
    "attention.in_proj_weight": (1, 4, 12, 1),
    "attention.out_proj.weight": (1, 4, 4, 1),
}


def test_every_prunable_weight_has_its_channels() -> None:
    found = channels(Net())
    assert {n: (c.graphs, c.inputs, c.outputs, c.kernel) for n, c in found.items()} == EXPECTED
    assert set(found) == set(Masks.dense(Net()))
    for name, layer in found.items():
        assert layer.pairs * layer.kernel == Masks.dense(Net())[name].numel()


@pytest.mark.parametrize("name", ["plain", "grouped", "depthwise", "up", "linear"])
def test_an_edge_is_what_connects_an_input_to_an_output(name: str) -> None:
    """An output of the module depends on an input channel exactly where the block-diagonal edges say so."""
    module: Any = Net().get_submodule(name)
    layer = channels(Net())[f"{name}.weight"]
    edges = torch.rand(layer.graphs, layer.outputs, layer.inputs, generator=torch.Generator().manual_seed(0)) < 0.5
    with torch.no_grad():
        module.weight.copy_(layer.mask(edges))
    wide, tall = layer.graphs * layer.inputs, layer.graphs * layer.outputs
    connected = torch.zeros(tall, wide, dtype=torch.bool)
    for channel in range(wide):
        image = torch.zeros(1, wide) if name == "linear" else torch.zeros(1, wide, 5, 5)
        image[0, channel] = 1.0
        connected[:, channel] = module(image)[0].reshape(tall, -1).ne(0).any(dim=1)
    assert torch.equal(connected, torch.block_diag(*edges.float()).bool())


def test_edges_are_pairs_with_any_weight_left() -> None:
    layer = Channels.of((4, 3, 3, 3), groups=2)
    mask = torch.zeros(4, 3, 3, 3, dtype=torch.bool)
    mask[0, 1, 2, 2] = mask[3, 2] = True
    wanted = torch.zeros(2, 2, 3, dtype=torch.bool)
    wanted[0, 0, 1] = wanted[1, 1, 2] = True
    assert torch.equal(layer.edges(mask), wanted)
    assert torch.equal(layer.edges(layer.mask(wanted)), wanted)
    assert int(layer.mask(wanted).sum()) == 2 * 9


def test_tied_weights_are_one_entry_with_the_module_s_groups() -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2, bias=False), nn.Conv2d(4, 4, 3, groups=2, bias=False))
    net[1].weight = net[0].weight
    assert {name: layer.graphs for name, layer in channels(net).items()} == {"0.weight": 2}
