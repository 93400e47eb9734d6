"""Measures of layer graphs against dense eigen-decompositions, a search, enumeration and hand-made cases."""

from __future__ import annotations

import csv
import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from utils.masks import Masks
from utils.params.graph import Graph
from utils.pruning import graph_quality, graphs
from utils.pruning.graph_quality import Quality, components, spectrum
from utils.pruning.graph_quality.expansion import Expansion
from utils.pruning.graph_quality.spectrum import gaps, imdb, singular_values
from utils.system.errors import UserError


def random_edges(outputs: int, inputs: int, density: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((outputs, inputs)) < density


def eigenvalues(edges: np.ndarray) -> np.ndarray:
    """Sizes of the eigenvalues of the whole adjacency, inputs and outputs together, falling."""
    outputs, inputs = edges.shape
    adjacency = np.zeros((outputs + inputs, outputs + inputs))
    adjacency[:outputs, outputs:] = edges
    adjacency[outputs:, :outputs] = edges.T
    return np.sort(np.abs(np.linalg.eigvalsh(adjacency)))[::-1]


def reached(edges: np.ndarray) -> int:
    """Components among vertices with an edge, by search."""
    outputs, inputs = edges.shape
    left = {("o", i) for i in range(outputs) if edges[i].any()} | {("i", j) for j in range(inputs) if edges[:, j].any()}
    count = 0
    while left:
        todo = [left.pop()]
        count += 1
        while todo:
            side, n = todo.pop()
            line = edges[n] if side == "o" else edges[:, n]
            other = {("i" if side == "o" else "o", int(k)) for k in np.flatnonzero(line)} & left
            left -= other
            todo += other
    return count


CASES = [(12, 9, 0.5), (9, 30, 0.4), (40, 40, 0.1), (20, 20, 0.03), (5, 7, 1.0), (1, 6, 1.0), (6, 4, 0.0)]


@pytest.mark.parametrize(("outputs", "inputs", "density"), CASES)
@pytest.mark.parametrize("small", [True, False])
def test_singular_values_are_eigenvalues_of_the_adjacency(
    outputs: int, inputs: int, density: float, small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not small:
        monkeypatch.setattr(spectrum, "_EXACT", 0)
    for seed in range(4):
        edges = random_edges(outputs, inputs, density, seed)
        sizes = eigenvalues(edges)
        tolerance = 1e-10 if small else 1e-6
        assert singular_values(edges) == pytest.approx((sizes[0], sizes[2]), abs=tolerance)


@pytest.mark.parametrize(("outputs", "inputs", "density"), [(12, 9, 0.5), (9, 30, 0.6), (40, 40, 0.2), (60, 24, 0.2)])
def test_ramanujan_gaps_against_the_adjacency(outputs: int, inputs: int, density: float) -> None:
    edges = random_edges(outputs, inputs, density)
    edges[0] = edges[:, 1] = False  # dead vertices are left out of the mean degrees
    sizes, count = eigenvalues(edges), edges.sum()
    d_in, d_out = count / edges.any(axis=0).sum(), count / edges.any(axis=1).sum()
    assert min(d_in, d_out) >= 3
    found = gaps(edges)
    assert found is not None
    s = 2 * math.sqrt(sizes[0] - 1) - sizes[2]
    r = math.sqrt(d_in - 1) + math.sqrt(d_out - 1) - sizes[2]
    assert (found.s, found.r) == pytest.approx((s, r), abs=1e-9)
    assert found.s_normalised == pytest.approx(s / (2 * math.sqrt(sizes[0] - 1)), abs=1e-9)
    assert found.r_normalised == pytest.approx(r / (math.sqrt(d_in - 1) + math.sqrt(d_out - 1)), abs=1e-9)


def test_gaps_of_known_graphs() -> None:
    """Complete K(3,4): sigma 2 sqrt(3), 0. The Heawood graph is 3-regular with sigma 3, sqrt(2); it is Ramanujan."""
    complete = gaps(np.ones((3, 4), dtype=bool))
    assert complete is not None
    assert complete.s == pytest.approx(2 * math.sqrt(math.sqrt(12) - 1))
    assert complete.r == pytest.approx(math.sqrt(2) + math.sqrt(3))
    assert complete.r_normalised == pytest.approx(1.0)
    plane = np.zeros((7, 7), dtype=bool)
    for point, step in itertools.product(range(7), (0, 1, 3)):
        plane[point, (point + step) % 7] = True
    heawood = gaps(plane)
    assert heawood is not None
    assert (heawood.s, heawood.r) == pytest.approx((2 * math.sqrt(2) - math.sqrt(2),) * 2)


def test_gaps_are_undefined_below_mean_degree_three() -> None:
    assert gaps(np.ones((3, 3), dtype=bool)) is not None
    hole = np.ones((3, 3), dtype=bool)
    hole[0, 0] = False
    assert gaps(hole) is None
    assert gaps(np.ones((2, 9), dtype=bool)) is None  # inputs have degree 2
    assert gaps(np.zeros((5, 5), dtype=bool)) is None


def test_imdb_by_hand() -> None:
    """Four inputs joined to all of five outputs, three to the first three of them, two to four (too few inputs).

    K(4,5): sigma1 sqrt(20), sigma2 0, degrees 5 and 4. K(3,3) with two outputs left out: sigma1 3, sigma2 0, degree 3.
    """
    edges = np.zeros((5, 9), dtype=bool)
    edges[:, :4] = True
    edges[:3, 4:7] = True
    edges[:4, 7:] = True
    mean, count = imdb(edges)
    assert count == 2
    assert mean is not None
    assert mean.s == pytest.approx((2 * math.sqrt(math.sqrt(20) - 1) + 2 * math.sqrt(2)) / 2)
    assert mean.r == pytest.approx((math.sqrt(4) + math.sqrt(3) + 2 * math.sqrt(2)) / 2)
    assert (mean.s_normalised, mean.r_normalised) == pytest.approx((1.0, 1.0))
    assert imdb(edges[:, 7:]) == (None, 0)


def test_imdb_of_a_regular_graph_is_its_gap() -> None:
    edges = graphs.graph["rreg"](graphs.Sides(30, 30), 5, True, np.random.default_rng(0), Graph(kind="rreg"))
    found, count = imdb(edges)
    assert found is not None
    assert count == 1
    assert found == gaps(edges)


@pytest.mark.parametrize("density", [0.0, 0.02, 0.05, 0.1, 0.5])
@pytest.mark.parametrize(("outputs", "inputs"), [(20, 20), (7, 40), (1, 3)])
def test_components_against_a_search(outputs: int, inputs: int, density: float) -> None:
    for seed in range(5):
        edges = random_edges(outputs, inputs, density, seed)
        assert components(edges) == reached(edges)


def enumerated(edges: np.ndarray) -> float:
    """The mean the estimate converges to: every size with equal weight, then every set of that size."""
    sides = []
    for table in (edges, edges.T):
        n = table.shape[1]
        sizes = range(1, max(1, math.ceil(n / 2) - 1) + 1)
        means = [
            np.mean([table[:, list(s)].any(axis=1).sum() / k for s in itertools.combinations(range(n), k)])
            for k in sizes
        ]
        sides.append(np.mean(means))
    return float(np.mean(sides))


@pytest.mark.parametrize(("outputs", "inputs", "density"), [(8, 11, 0.3), (5, 10, 0.6), (9, 9, 0.15), (2, 9, 0.7)])
def test_expansion_against_enumeration(outputs: int, inputs: int, density: float) -> None:
    edges = random_edges(outputs, inputs, density)
    estimates = [Expansion(inputs, outputs, np.random.default_rng(seed))(edges) for seed in range(20)]
    error = float(np.std(estimates, ddof=1)) / math.sqrt(len(estimates))
    assert np.mean(estimates) == pytest.approx(enumerated(edges), abs=5 * error)


def test_expansion_of_complete_graphs_by_hand() -> None:
    """K(4,4): single vertices alone, each with 4 neighbours. K(2,2) and K(1,1): sides of two channels or fewer."""
    for n, wanted in [(4, 4.0), (2, 2.0), (1, 1.0)]:
        assert Expansion(n, n, np.random.default_rng(0))(np.ones((n, n), dtype=bool)) == wanted
    # K(8,8): sizes 1, 2, 3: mean of 8/k is 8 (1 + 1/2 + 1/3) / 3.
    found = Expansion(8, 8, np.random.default_rng(0), samples=20000)(np.ones((8, 8), dtype=bool))
    assert found == pytest.approx(8 * (11 / 6) / 3, rel=0.02)


def test_expansion_without_edges_and_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Expansion(5, 6, np.random.default_rng(0))(np.zeros((6, 5), dtype=bool)) == 0.0
    edges = random_edges(30, 20, 0.2)
    whole = Expansion(20, 30, np.random.default_rng(0), samples=200)(edges)
    monkeypatch.setattr("utils.pruning.graph_quality.expansion._WORDS", 1)
    assert Expansion(20, 30, np.random.default_rng(0), samples=200)(edges) == whole


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 8, 3, bias=False)
        self.grouped = nn.Conv2d(8, 12, 3, groups=2, bias=False)
        self.linear = nn.Linear(12, 5)


def some_masks() -> Masks:
    generator = torch.Generator().manual_seed(1)
    masks = {name: torch.rand(m.shape, generator=generator) < 0.4 for name, m in Masks.dense(Net()).items()}
    masks["conv.weight"][2] = masks["conv.weight"][:, 3] = False
    masks["conv.weight"][4] &= torch.arange(9).reshape(3, 3) == 5
    return Masks(masks)


def test_rows_of_any_mask() -> None:
    masks = some_masks()
    conv, grouped, linear = graph_quality.rows(Net(), masks)
    edges = masks["conv.weight"].flatten(2).any(dim=2).numpy()
    assert (conv.name, conv.shape, conv.graphs, conv.inputs, conv.outputs, conv.kernel) == (
        "conv.weight", "8x6x3x3", 1, 6, 8, 9)  # fmt: skip
    assert (conv.kept, conv.density) == (masks.counts["conv.weight"], masks.counts["conv.weight"] / 432)
    assert (conv.edges, conv.edge_density) == (edges.sum(), edges.sum() / 48)
    ins, outs = edges.sum(axis=0), edges.sum(axis=1)
    assert (conv.in_degree_min, conv.in_degree_mean, conv.in_degree_max) == (0, ins.mean(), ins.max())
    assert (conv.out_degree_min, conv.out_degree_mean, conv.out_degree_max) == (0, outs.mean(), outs.max())
    assert conv.in_degrees == " ".join(f"{d}:{(ins == d).sum()}" for d in sorted(set(ins.tolist())))
    assert (conv.dead_inputs, conv.dead_outputs) == ((ins == 0).sum(), (outs == 0).sum()) == (1, 1)
    assert conv.components == reached(edges)
    assert (conv.sigma1, conv.sigma2) == pytest.approx(tuple(eigenvalues(edges)[[0, 2]]))
    assert conv.delta_s == pytest.approx(2 * math.sqrt(conv.sigma1 - 1) - conv.sigma2)
    assert conv.expansion > 0
    block = masks["grouped.weight"].flatten(2).any(dim=2).numpy()
    both = np.zeros((12, 8), dtype=bool)
    both[:6, :4], both[6:, 4:] = block[:6], block[6:]
    assert (grouped.graphs, grouped.inputs, grouped.outputs) == (2, 8, 12)
    assert grouped.edge_density == both.sum() / 48
    assert grouped.components == reached(both) == 2
    assert (grouped.sigma1, grouped.sigma2) == pytest.approx(tuple(eigenvalues(both)[[0, 2]]))
    assert (linear.kernel, linear.edges) == (1, linear.kept)


def test_rows_of_elements() -> None:
    masks = some_masks()
    conv, grouped, _ = graph_quality.rows(Net(), masks, elements=True)
    edges = masks["conv.weight"].reshape(8, 54).numpy()
    assert (conv.inputs, conv.outputs, conv.kernel) == (54, 8, 1)
    assert conv.edges == conv.kept == edges.sum()
    assert conv.dead_inputs == (~edges.any(axis=0)).sum()
    assert (conv.sigma1, conv.sigma2) == pytest.approx(tuple(eigenvalues(edges)[[0, 2]]))
    assert (grouped.inputs, grouped.edges, grouped.edge_density) == (72, grouped.kept, grouped.density)


def test_a_dead_layer_has_a_row() -> None:
    masks = Masks({name: torch.zeros_like(mask) for name, mask in Masks.dense(Net()).items()})
    for row in graph_quality.rows(Net(), masks):
        assert (row.edges, row.components, row.sigma1, row.sigma2, row.expansion) == (0, 0, 0.0, 0.0, 0.0)
        assert (row.dead_inputs, row.dead_outputs) == (row.inputs, row.outputs)
        assert (row.delta_s, row.delta_r, row.imdb_s, row.imdb_graphs) == (None, None, None, 0)


def test_rows_repeat_and_refuse_foreign_masks() -> None:
    masks = some_masks()
    assert graph_quality.rows(Net(), masks) == graph_quality.rows(Net(), masks)
    other = graph_quality.rows(Net(), masks, seed=1)
    assert other != graph_quality.rows(Net(), masks)
    assert [replace(row, expansion=0) for row in other] == [
        replace(row, expansion=0) for row in graph_quality.rows(Net(), masks)
    ]
    with pytest.raises(UserError):
        graph_quality.rows(nn.Linear(3, 3), masks)


def test_regular_graphs_beat_x_nets_and_random_graphs_of_equal_size() -> None:
    """512 channels, degree 3: regular graphs have no dead channel, the least sigma2 and the largest expansion."""
    layer = nn.Linear(512, 512, bias=False)
    dense = Masks.dense(layer)
    found: dict[str, Quality] = {}
    for kind in ("rreg", "xnet", "random"):
        masks = graphs.prune(layer, dense, Graph(kind=kind), {"weight": 3 * 512}, 0)
        (found[kind],) = graph_quality.rows(layer, masks)
    assert len({row.edges for row in found.values()}) == 1
    assert found["rreg"].dead_inputs == found["rreg"].dead_outputs == 0
    assert found["xnet"].dead_inputs == 0
    assert found["xnet"].dead_outputs / 512 == pytest.approx(math.exp(-3), abs=0.03)
    assert found["rreg"].sigma2 < found["xnet"].sigma2 < found["random"].sigma2
    assert found["rreg"].expansion > found["xnet"].expansion > found["random"].expansion
    # Measured for published draws: sigma2 2.83, 3.55, 3.90; expansion 2.32, 2.25, 2.13.
    wanted = {"rreg": (2.83, 2.32), "xnet": (3.55, 2.25), "random": (3.90, 2.13)}
    for kind, (sigma2, expansion) in wanted.items():
        assert found[kind].sigma2 == pytest.approx(sigma2, rel=0.06)
        assert found[kind].expansion == pytest.approx(expansion, rel=0.03)


def test_csv_and_table(tmp_path: Path) -> None:
    rows = graph_quality.rows(Net(), some_masks())
    graph_quality.write_quality_csv(tmp_path / "quality.csv", rows)
    with open(tmp_path / "quality.csv", newline="", encoding="utf-8") as handle:
        written = list(csv.DictReader(handle))
    assert [row["name"] for row in written] == list(some_masks())
    for row, line in zip(rows, written, strict=True):
        assert list(line) == list(Quality.__dataclass_fields__)
        assert float(line["sigma2"]) == row.sigma2
        assert float(line["density"]) == row.density
        assert line["imdb_s"] == ("" if row.imdb_s is None else str(row.imdb_s))
    lines = graph_quality.quality_table(rows).splitlines()
    assert len(lines) == 4
    assert len({len(line) for line in lines}) == 1
    assert lines[1].split()[:3] == ["conv.weight", f"{rows[0].density:.4f}", str(rows[0].edges)]
    assert "density" in lines[0]
