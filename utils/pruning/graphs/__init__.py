"""Layer graphs: masks drawn as random bipartite graphs of channels, without scores or data.

Each layer is a bipartite graph of its input and output channels (see `utils.pruning.bipartite`) and a kept edge keeps
its whole kernel. A graph kind is a function `(Sides, degree, exact, rng, section) -> bool [outputs, inputs]`:

- by degree (exact is False), as published: `degree` is the same number in all layers and means what the kind says;
- by density (exact is True): exactly `degree * max(inputs, outputs)` edges, so that all kinds keep equally many.

The generator of random numbers is seeded by (seed, layer name, group), so graphs differ between layers and groups, are
equal on all ranks without communication, and do not depend on which other layers are drawn.

A new kind is one decorated function in a file of this package. Source: the layer graphs of X-Nets (Prabhu et al. 2018)
and of expander pruning before training (random, X-Net and randomly regular graphs; CVPR 2023 workshops).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from utils.data.stateless import derive
from utils.masks import Masks
from utils.params.graph import Graph
from utils.pruning.bipartite import Channels, channels
from utils.system.errors import UserError
from utils.system.registry import Registry


@dataclass(frozen=True)
class Sides:
    """The vertices of one graph."""

    inputs: int
    outputs: int

    @property
    def larger(self) -> int:
        """Vertices of the larger side."""
        return max(self.inputs, self.outputs)

    @property
    def smaller(self) -> int:
        """Vertices of the smaller side: the largest degree of the other one."""
        return min(self.inputs, self.outputs)


Kind = Callable[[Sides, int, bool, np.random.Generator, Graph], np.ndarray]

graph: Registry[Kind] = Registry("graph")


@dataclass(frozen=True)
class Row:
    """What was drawn for one layer.

    graphs: separate graphs (groups) with `inputs` and `outputs` vertices each; kernel: weights per edge; degree: edges
    per vertex that the kind was asked for; requested: weights the density gave the layer (None by degree); kept:
    weights of the drawn edges; edges, pairs: drawn and possible edges over all graphs.
    """

    name: str
    graphs: int
    inputs: int
    outputs: int
    kernel: int
    degree: int
    requested: int | None
    kept: int
    edges: int
    pairs: int


@dataclass(frozen=True)
class GraphPruned:
    """Masks drawn as graphs, with a row per layer."""

    masks: Masks
    rows: tuple[Row, ...]

    @property
    def requested(self) -> int | None:
        """Weights asked for over all layers; None by degree."""
        counts = [row.requested for row in self.rows if row.requested is not None]
        return sum(counts) if counts else None

    def summary(self) -> str:
        """One line: what was kept, and how far whole degrees lie from the request."""
        text = f"kept {self.masks.kept:,} of {self.masks.total:,} weights (density {self.masks.density:.6f})"
        if self.requested is None:
            return text
        furthest = max(self.rows, key=lambda row: abs(row.kept - (row.requested or 0)))
        return (
            f"{text}, {self.masks.kept - self.requested:+,} against the {self.requested:,} asked for; whole degrees "
            f"differ most in {furthest.name}: {furthest.kept:,} kept, {furthest.requested:,} asked for"
        )


def prune(model: nn.Module, masks: Masks, section: Graph, counts: Mapping[str, int] | None, seed: int) -> Masks:
    """The masks of `build`."""
    return build(model, masks, section, counts, seed).masks


def build(model: nn.Module, masks: Masks, section: Graph, counts: Mapping[str, int] | None, seed: int) -> GraphPruned:
    """Draw a graph for every entry of `masks`.

    masks: dense, the layers to draw; counts: weights to keep per layer (density form), or None for `section.degree`
    in all layers. Layers and groups with one input (depthwise convolutions) are kept whole: such a graph is a star,
    and an edge taken from it is an output lost. Raises UserError for an unknown kind, a missing degree and masks
    that are not dense.
    """
    kind = graph[section.kind or "none"]
    if masks.kept != masks.total:
        raise UserError(
            f"graph.kind={section.kind}: graphs are drawn on whole layers, but {masks.total - masks.kept:,} weights "
            "are pruned already; remove pruning.mask_file"
        )
    if counts is None and section.degree is None:
        raise UserError(f"graph.kind={section.kind}: needs graph.degree or pruning.density; set one of them")
    known = channels(model)
    drawn: dict[str, torch.Tensor] = {}
    rows: list[Row] = []
    for name in masks:
        layer, requested = known[name], None if counts is None else counts[name]
        degree = section.degree or 1 if requested is None else nearest_degree(layer, requested)
        edges = _edges(kind, layer, degree, requested is not None, section, f"{seed}\0{name}")
        drawn[name] = layer.mask(edges)
        rows.append(_row(name, layer, degree, requested, int(edges.sum())))
    return GraphPruned(Masks(drawn), tuple(rows))


def nearest_degree(layer: Channels, weights: int) -> int:
    """The whole degree of the larger side, from 1 to dense, that keeps nearest to `weights` (halves go up)."""
    per_degree = layer.graphs * layer.kernel * max(layer.inputs, layer.outputs)
    return min(max(1, (2 * weights + per_degree) // (2 * per_degree)), min(layer.inputs, layer.outputs))


def _edges(kind: Kind, layer: Channels, degree: int, exact: bool, section: Graph, key: str) -> torch.Tensor:
    if layer.inputs == 1:
        return torch.ones(layer.graphs, layer.outputs, layer.inputs, dtype=torch.bool)
    sides = Sides(layer.inputs, layer.outputs)
    blocks = [
        kind(sides, degree, exact, np.random.default_rng(derive("graph", key, group)), section)
        for group in range(layer.graphs)
    ]
    return torch.from_numpy(np.stack(blocks))


def _row(name: str, layer: Channels, degree: int, requested: int | None, edges: int) -> Row:
    sides = (layer.graphs, layer.inputs, layer.outputs, layer.kernel)
    return Row(name, *sides, degree, requested, edges * layer.kernel, edges, layer.pairs)
