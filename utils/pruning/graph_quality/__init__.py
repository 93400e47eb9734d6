"""How good the layer graphs of a mask are: a row of measures per layer, as a table and as CSV.

Any mask will do, whatever drew it. The graph of a layer has a vertex per channel and an edge where a mask keeps any
weight between two of them; with `elements` it has a vertex per column of the flattened weight instead (c_out rows,
c_in * kernel columns), as the Ramanujan measures were published. The groups of a grouped convolution are separate
parts of one graph.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components
from torch import nn

from utils.data.stateless import derive
from utils.masks import Masks
from utils.pruning.bipartite import Channels, channels
from utils.pruning.graph_quality.expansion import Expansion
from utils.pruning.graph_quality.spectrum import Gaps, gaps, imdb, singular_values
from utils.system.atomic import replacing


@dataclass(frozen=True)
class Quality:
    """Measures of one layer's graph; None where a measure is undefined.

    kernel: weights an edge may stand for; kept, density: weights of the mask; edges, edge_density: of the graph, over
    the pairs its groups allow. Degrees count dead vertices (degree 0); histograms are `degree:vertices` pairs.
    dead_inputs, dead_outputs: vertices without an edge; components: connected parts of the others.
    expansion: estimate over all vertices. delta_*, imdb_*: see `spectrum`; imdb_graphs: sub-graphs in the mean.
    """

    name: str
    shape: str
    graphs: int
    inputs: int
    outputs: int
    kernel: int
    kept: int
    density: float
    edges: int
    edge_density: float
    in_degree_min: int
    in_degree_mean: float
    in_degree_max: int
    out_degree_min: int
    out_degree_mean: float
    out_degree_max: int
    in_degrees: str
    out_degrees: str
    dead_inputs: int
    dead_outputs: int
    components: int
    expansion: float
    sigma1: float
    sigma2: float
    delta_s: float | None
    delta_s_normalised: float | None
    delta_r: float | None
    delta_r_normalised: float | None
    imdb_s: float | None
    imdb_s_normalised: float | None
    imdb_r: float | None
    imdb_r_normalised: float | None
    imdb_graphs: int


def rows(
    model: nn.Module, masks: Masks, *, elements: bool = False, seed: int = 0, samples: int = 1000
) -> list[Quality]:
    """A `Quality` for every entry of `masks`, in their order.

    elements: the element-level graph instead of the channels'; seed, samples: of the expansion estimate.
    Raises UserError for masks that are not this model's.
    """
    masks.check(model)
    known = channels(model)
    return [_quality(name, known[name], masks[name], elements, (seed, samples)) for name in masks]


def _quality(name: str, layer: Channels, mask: torch.Tensor, elements: bool, drawn: tuple[int, int]) -> Quality:
    if elements:
        blocks = layer.blocks(mask).reshape(layer.graphs, layer.outputs, layer.inputs * layer.kernel)
    else:
        blocks = layer.edges(mask)
    kept, edges = int(mask.sum()), _diagonal(blocks)
    count, ins, outs = int(np.count_nonzero(edges)), edges.sum(axis=0), edges.sum(axis=1)
    sigma = singular_values(edges) if layer.graphs == 1 else _largest(blocks)
    gap, (mean, graphs) = gaps(edges, sigma), imdb(edges)
    seed, samples = drawn
    expansion = Expansion(len(ins), len(outs), np.random.default_rng(derive("expansion", seed, name)), samples)
    return Quality(
        name,
        "x".join(map(str, layer.shape)),
        layer.graphs,
        len(ins),
        len(outs),
        1 if elements else layer.kernel,
        kept,
        kept / mask.numel() if mask.numel() else 1.0,
        count,
        count / blocks.numel() if blocks.numel() else 1.0,
        *_degrees(ins),
        *_degrees(outs),
        _histogram(ins),
        _histogram(outs),
        int((ins == 0).sum()),
        int((outs == 0).sum()),
        components(edges),
        expansion(edges),
        *sigma,
        *_four(gap),
        *_four(mean),
        graphs,
    )


def components(edges: np.ndarray) -> int:
    """Connected components of a biadjacency, bool [outputs, inputs], among the vertices that have an edge."""
    outs, ins = np.nonzero(edges)
    size = sum(edges.shape)
    graph = csr_matrix((np.ones(len(outs), dtype=np.int8), (outs, edges.shape[0] + ins)), shape=(size, size))
    alone = int((~edges.any(axis=0)).sum() + (~edges.any(axis=1)).sum())
    return int(connected_components(graph, directed=False, return_labels=False)) - alone


def _diagonal(blocks: torch.Tensor) -> np.ndarray:
    """Bool [graphs * outputs, graphs * inputs]: separate graphs [graphs, outputs, inputs] as parts of one."""
    graphs, outputs, inputs = blocks.shape
    whole = np.zeros((graphs, outputs, graphs, inputs), dtype=bool)
    each = np.arange(graphs)
    whole[each, :, each, :] = blocks.numpy()
    return whole.reshape(graphs * outputs, graphs * inputs)


def _largest(blocks: torch.Tensor) -> tuple[float, float]:
    """The two largest singular values of separate graphs taken together."""
    if not blocks.numel():
        return 0.0, 0.0
    values = torch.linalg.svdvals(blocks.double()).reshape(-1).sort(descending=True).values[:2].tolist()
    return values[0], values[1] if len(values) > 1 else 0.0


def _degrees(degrees: np.ndarray) -> tuple[int, float, int]:
    return (int(degrees.min()), float(degrees.mean()), int(degrees.max())) if len(degrees) else (0, 0.0, 0)


def _four(gap: Gaps | None) -> tuple[float | None, float | None, float | None, float | None]:
    return (gap.s, gap.s_normalised, gap.r, gap.r_normalised) if gap else (None, None, None, None)


def _histogram(degrees: np.ndarray) -> str:
    values, counts = np.unique(degrees, return_counts=True)
    return " ".join(f"{value}:{count}" for value, count in zip(values, counts, strict=True))


def write_quality_csv(path: str | Path, rows: Sequence[Quality]) -> None:
    """Write rows as CSV, atomically: a column per field, numbers in full precision, empty where undefined."""
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(field.name for field in fields(Quality))
        writer.writerows(astuple(row) for row in rows)


_TABLE = ("name", "density", "edges", "in degree", "out degree", "dead in", "dead out", "parts", "expansion")
_SPECTRAL = ("sigma1", "sigma2", "delta_s", "delta_r", "imdb_s", "imdb_r")


def quality_table(rows: Sequence[Quality]) -> str:
    """The measures as aligned text without a final newline; degrees are min/mean/max, `-` is undefined."""
    lines = [(*_TABLE, *_SPECTRAL), *(_line(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(_aligned(line, widths) for line in lines)


def _aligned(line: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(f"{cell:{'>' if i else '<'}{widths[i]}}" for i, cell in enumerate(line))


def _line(row: Quality) -> tuple[str, ...]:
    return (
        row.name,
        f"{row.density:.4f}",
        f"{row.edges:,}",
        f"{row.in_degree_min}/{row.in_degree_mean:.1f}/{row.in_degree_max}",
        f"{row.out_degree_min}/{row.out_degree_mean:.1f}/{row.out_degree_max}",
        f"{row.dead_inputs:,}",
        f"{row.dead_outputs:,}",
        f"{row.components:,}",
        f"{row.expansion:.3f}",
        *("-" if (value := getattr(row, name)) is None else f"{value:.3f}" for name in _SPECTRAL),
    )
