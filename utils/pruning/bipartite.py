"""A layer's weight seen as bipartite graphs: a vertex per input and output channel, an edge per channel pair.

An edge stands for the whole kernel between two channels; in a linear layer it is one weight. A grouped convolution is
as many separate graphs as it has groups, each on its own inputs and outputs. A transposed convolution stores inputs
before outputs; the view puts that right. The stacked projection of an attention module is one graph.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from utils.masks import bare

_TRANSPOSED = nn.modules.conv._ConvTransposeNd


@dataclass(frozen=True)
class Channels:
    """How a weight splits into graphs.

    graphs: separate graphs (groups); inputs, outputs: vertices of each; kernel: weights per edge; shape: the weight's.
    """

    graphs: int
    inputs: int
    outputs: int
    kernel: int
    transposed: bool
    shape: tuple[int, ...]

    @staticmethod
    def of(shape: Iterable[int], groups: int = 1, transposed: bool = False) -> Channels:
        """Channels of a weight [out, in / groups, *kernel], or [in, out / groups, *kernel] when transposed."""
        shape = tuple(shape)
        first, second, kernel = shape[0] // groups, shape[1], math.prod(shape[2:])
        inputs, outputs = (first, second) if transposed else (second, first)
        return Channels(groups, inputs, outputs, kernel, transposed, shape)

    @property
    def pairs(self) -> int:
        """Edges of the dense layer, over all its graphs."""
        return self.graphs * self.inputs * self.outputs

    def blocks(self, weight: torch.Tensor) -> torch.Tensor:
        """`weight` as [graphs, outputs, inputs, kernel]; a view where its layout allows."""
        rows = (self.inputs, self.outputs) if self.transposed else (self.outputs, self.inputs)
        blocks = weight.reshape(self.graphs, *rows, self.kernel)
        return blocks.transpose(1, 2) if self.transposed else blocks

    def edges(self, mask: torch.Tensor) -> torch.Tensor:
        """Bool [graphs, outputs, inputs]: the channel pairs of which `mask` keeps any weight."""
        return self.blocks(mask).any(dim=3)

    def mask(self, edges: torch.Tensor) -> torch.Tensor:
        """The bool mask, in the weight's shape, that keeps whole kernels at `edges` [graphs, outputs, inputs]."""
        rows = edges.transpose(1, 2) if self.transposed else edges
        return rows[..., None].expand(*rows.shape, self.kernel).reshape(self.shape)


def channels(model: nn.Module) -> dict[str, Channels]:
    """The channels of every weight of a convolution, linear or attention layer, by parameter name; tied weights once.

    The number of groups is the module's own: the weight's shape does not tell it.
    """
    model = bare(model)
    owner: dict[int, tuple[int, bool]] = {}
    for module in model.modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            owner.setdefault(id(module.weight), (module.groups, isinstance(module, _TRANSPOSED)))
    return {
        name: Channels.of(p.shape, *owner.get(id(p), (1, False)))
        for name, p in model.named_parameters()
        if p.dim() >= 2
    }
