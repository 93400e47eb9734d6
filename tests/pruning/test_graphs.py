"""Layer graphs: degrees, equal counts, seeds and groups; sizes against published densities and closed forms."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from utils import models
from utils.masks import Masks
from utils.params.graph import Graph
from utils.pruning import graphs
from utils.pruning.graphs import Sides, _draw, graph
from utils.pruning.graphs import random as random_module
from utils.pruning.graphs import rreg as rreg_module
from utils.system.errors import UserError

RANDOM, XNET = Graph(kind="random"), Graph(kind="xnet")
SIMPLE, PAPER = Graph(kind="rreg"), Graph(kind="rreg", form="paper", tries=3)
KINDS = [RANDOM, XNET, replace(XNET, side="out"), replace(XNET, side="smaller"), SIMPLE, PAPER]
SIDES = [(3, 64), (64, 64), (64, 256), (256, 64), (48, 10), (7, 12), (1, 5), (2, 2)]


def draw(section: Graph, inputs: int, outputs: int, degree: int, exact: bool = False, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    edges = graph[str(section.kind)](Sides(inputs, outputs), degree, exact, rng, section)
    assert edges.dtype == bool
    assert edges.shape == (outputs, inputs)
    return edges


def label(section: Graph) -> str:
    return f"{section.kind}-{section.side}-{section.form}"


@pytest.mark.parametrize(("inputs", "outputs"), SIDES)
@pytest.mark.parametrize("section", KINDS, ids=label)
def test_by_density_every_kind_keeps_exactly_degree_times_the_larger_side(
    section: Graph, inputs: int, outputs: int
) -> None:
    for degree in range(1, min(inputs, outputs, 9) + 1):
        for seed in range(3):
            assert draw(section, inputs, outputs, degree, True, seed).sum() == degree * max(inputs, outputs)
    assert draw(section, inputs, outputs, min(inputs, outputs), True).all()


@pytest.mark.parametrize(("inputs", "outputs"), SIDES)
@pytest.mark.parametrize("degree", [1, 2, 3, 5, 60])
def test_simple_rreg_is_biregular(inputs: int, outputs: int, degree: int) -> None:
    larger, smaller = max(inputs, outputs), min(inputs, outputs)
    edges = draw(SIMPLE, inputs, outputs, degree)
    by_larger = edges.sum(axis=1) if outputs >= inputs else edges.sum(axis=0)
    by_smaller = edges.sum(axis=0) if outputs >= inputs else edges.sum(axis=1)
    if degree >= smaller:
        assert edges.all()
        return
    assert set(by_larger.tolist()) == {degree}
    mean = degree * larger / smaller
    assert set(by_smaller.tolist()) <= {math.floor(mean), math.ceil(mean)}
    if inputs == outputs:
        assert set(by_smaller.tolist()) == {degree}


def test_simple_rreg_of_every_degree_of_small_sides() -> None:
    for inputs in range(2, 9):
        for outputs in range(2, 9):
            for degree in range(1, min(inputs, outputs) + 1):
                edges = draw(SIMPLE, inputs, outputs, degree, seed=inputs)
                axis = 1 if outputs >= inputs else 0
                assert (edges.sum(axis=axis) == degree).all()
                assert np.ptp(edges.sum(axis=1 - axis)) <= 1


def test_simple_rreg_without_switches_falls_back_to_cyclic_shifts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rreg_module, "_ROUNDS", 0)
    for inputs, outputs, degree in [(64, 64, 5), (12, 7, 3), (64, 256, 30), (9, 8, 5)]:
        edges, again = (draw(SIMPLE, inputs, outputs, degree, seed=seed) for seed in (0, 1))
        axis = 1 if outputs >= inputs else 0
        assert (edges.sum(axis=axis) == degree).all()
        assert np.ptp(edges.sum(axis=1 - axis)) <= 1
        assert not np.array_equal(edges, again)


def test_simple_rreg_reaches_every_graph_about_equally() -> None:
    """The six permutations of three channels and their complements (degrees 1 and 2), 600 draws each: chi-squared."""
    for degree in (1, 2):
        seen: dict[bytes, int] = {}
        for seed in range(600):
            key = draw(SIMPLE, 3, 3, degree, seed=seed).tobytes()
            seen[key] = seen.get(key, 0) + 1
        assert len(seen) == 6
        assert sum((n - 100) ** 2 / 100 for n in seen.values()) < 20.5  # 5 degrees of freedom, p = 0.001


@pytest.mark.parametrize(("inputs", "outputs"), SIDES)
@pytest.mark.parametrize("degree", [1, 3, 60])
def test_paper_rreg_collapses_a_matching_and_leaves_no_channel_dead(inputs: int, outputs: int, degree: int) -> None:
    edges = draw(PAPER, inputs, outputs, degree)
    larger, smaller = max(inputs, outputs), min(inputs, outputs)
    by_larger, by_smaller = (edges.sum(axis=1), edges.sum(axis=0)) if outputs >= inputs else (
        edges.sum(axis=0), edges.sum(axis=1))  # fmt: skip
    assert by_larger.min() >= 1
    assert by_smaller.min() >= 1
    assert by_larger.max() <= degree
    assert by_smaller.max() <= math.ceil(degree * larger / smaller)


def expected_edges(inputs: int, outputs: int, degree: int) -> float:
    """Mean number of different pairs in a random matching: a pair is missed when none of its stubs meet."""
    larger, smaller = max(inputs, outputs), min(inputs, outputs)
    stubs = degree * larger
    total = 0.0
    for vertex in range(smaller):
        own = stubs // smaller + (vertex < stubs % smaller)
        total += larger * (1.0 - math.comb(stubs - own, degree) / math.comb(stubs, degree))
    return total


@pytest.mark.parametrize(("inputs", "outputs", "degree"), [(3, 64, 3), (64, 64, 60), (64, 256, 3), (20, 33, 7)])
def test_paper_rreg_keeps_as_many_edges_as_random_matchings_do(inputs: int, outputs: int, degree: int) -> None:
    section = replace(PAPER, tries=1)
    counts = [draw(section, inputs, outputs, degree, seed=seed).sum() for seed in range(60)]
    error = max(np.std(counts) / math.sqrt(len(counts)), 0.1)
    assert np.mean(counts) == pytest.approx(expected_edges(inputs, outputs, degree), abs=5 * error)


def test_paper_densities_of_single_layers() -> None:
    """Measured for the published program: 0.71 of 3 -> 64 at degree 3, 0.616 of 64 -> 64 at degree 60."""
    assert expected_edges(3, 64, 3) / 192 == pytest.approx(0.71, abs=0.01)
    assert draw(replace(PAPER, tries=1), 64, 64, 60).mean() == pytest.approx(0.616, abs=0.015)


def test_paper_rreg_keeps_the_matching_that_expands_most() -> None:
    """Many tries expand more than one, measured on fresh sets; 40 pairs of 24-channel graphs of degree 2."""
    many, one = replace(PAPER, tries=60), replace(PAPER, tries=1)

    def expansion(edges: np.ndarray) -> float:
        rng, found = np.random.default_rng(99), []
        for _ in range(150):
            for table in (edges, edges.T):
                chosen = rng.permutation(table.shape[1])[: rng.integers(1, 12)]
                found.append(table[:, chosen].any(axis=1).sum() / len(chosen))
        return float(np.mean(found))

    gain = [expansion(draw(many, 24, 24, 2, seed=s)) - expansion(draw(one, 24, 24, 2, seed=s)) for s in range(40)]
    assert np.mean(gain) > 3 * np.std(gain) / math.sqrt(len(gain))


@pytest.mark.parametrize(("inputs", "outputs"), SIDES)
@pytest.mark.parametrize("side", ["in", "out", "smaller"])
@pytest.mark.parametrize("degree", [1, 3, 60])
def test_xnet_gives_its_side_the_degree(inputs: int, outputs: int, side: str, degree: int) -> None:
    edges = draw(replace(XNET, side=side), inputs, outputs, degree)
    by_input = side == "in" or (side == "smaller" and inputs <= outputs)
    degrees, other = (edges.sum(axis=0), outputs) if by_input else (edges.sum(axis=1), inputs)
    assert set(degrees.tolist()) == {min(degree, other)}


def test_xnet_by_density_has_degrees_as_equal_as_possible() -> None:
    for side, axis in (("in", 0), ("out", 1)):
        for inputs, outputs, degree in [(7, 12, 5), (12, 7, 5), (64, 100, 3)]:
            degrees = draw(replace(XNET, side=side), inputs, outputs, degree, True).sum(axis=axis)
            assert np.ptp(degrees) <= 1
            assert degrees.sum() == degree * max(inputs, outputs)


def test_random_by_degree_is_independent_with_the_published_probability() -> None:
    inputs, outputs, degree, draws = 40, 60, 6, 400
    counts = np.array([draw(RANDOM, inputs, outputs, degree, seed=seed).sum() for seed in range(draws)])
    mean, variance = inputs * degree, inputs * degree * (1 - degree / outputs)
    assert counts.mean() == pytest.approx(mean, abs=5 * math.sqrt(variance / draws))
    assert counts.var() == pytest.approx(variance, rel=5 * math.sqrt(2 / draws))
    assert draw(RANDOM, 5, 4, 4).all()


@pytest.mark.parametrize("section", [RANDOM, XNET, SIMPLE, replace(PAPER, tries=1)], ids=label)
@pytest.mark.parametrize("exact", [False, True])
def test_all_pairs_are_equally_likely(section: Graph, exact: bool) -> None:
    inputs, outputs, draws = 6, 9, 800
    total = np.sum([draw(section, inputs, outputs, 2, exact, seed) for seed in range(draws)], axis=0)
    share = total.mean() / draws
    if section.form == "paper":  # which inputs have the larger degree is fixed, so inputs differ but outputs do not
        total, draws = total.sum(axis=1), draws * inputs
    assert np.abs(total / draws - share).max() < 5 * math.sqrt(share * (1 - share) / draws)


def test_large_tables_are_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (_draw, random_module):
        monkeypatch.setattr(module, "_CHUNK", 100)
    assert draw(RANDOM, 30, 70, 5, True).sum() == 5 * 70
    assert draw(RANDOM, 30, 70, 7).sum() == pytest.approx(210, abs=5 * math.sqrt(210))
    assert (draw(XNET, 30, 70, 5).sum(axis=0) == 5).all()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, bias=False)
        self.grouped = nn.Conv2d(16, 32, 3, groups=4, bias=False)
        self.depthwise = nn.Conv2d(32, 64, 3, groups=32, bias=False)
        self.up = nn.ConvTranspose2d(64, 24, 2, groups=2, bias=False)
        self.same = nn.Conv2d(16, 32, 3, groups=4, bias=False)
        self.linear = nn.Linear(24, 10)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return Net()


@pytest.mark.parametrize("section", KINDS, ids=label)
def test_whole_kernels_one_graph_per_group(net: nn.Module, section: Graph) -> None:
    built = graphs.build(net, Masks.dense(net), replace(section, degree=2), None, 0)
    grouped = built.masks["grouped.weight"]
    assert bool((grouped.flatten(2).any(2) == grouped.flatten(2).all(2)).all())
    blocks = grouped[:, :, 0, 0].reshape(4, 8, 4)
    assert len({block.numpy().tobytes() for block in blocks}) > 1  # independent draws
    assert bool(built.masks["depthwise.weight"].all())
    if section is SIMPLE:
        assert bool((blocks.sum(dim=2) == 2).all())
        assert bool((blocks.sum(dim=1) == 4).all())
        up = built.masks["up.weight"][:, :, 0, 0].reshape(2, 32, 12)  # inputs x outputs of both groups
        assert bool((up.sum(dim=2) == 2).all())
        assert set(up.sum(dim=1).flatten().tolist()) == {5, 6}
    for row in built.rows:
        mask = built.masks[row.name]
        assert (row.kept, row.pairs * row.kernel) == (int(mask.sum()), mask.numel())
        assert row.edges * row.kernel == row.kept
        assert row.requested is None
        assert row.degree == 2
    assert built.requested is None


def test_counts_are_the_nearest_whole_degree_for_all_kinds_alike(net: nn.Module) -> None:
    dense = Masks.dense(net)
    for density in (0.0, 0.001, 0.1, 0.3, 0.5, 0.77, 1.0):
        counts = {name: round(density * mask.numel()) for name, mask in dense.items()}
        kept = [graphs.build(net, dense, section, counts, 0) for section in KINDS]
        assert all(built.masks.counts == kept[0].masks.counts for built in kept)
        # per degree: the larger side times groups times kernel
        steps: dict[str, int] = {
            "first": 16 * 9,
            "grouped": 32 * 9,
            "depthwise": 64 * 9,
            "up": 64 * 4,
            "same": 32 * 9,
            "linear": 24,
        }
        most = {"first": 3, "grouped": 4, "depthwise": 1, "up": 12, "same": 4, "linear": 10}
        for row in kept[0].rows:
            layer = row.name.removesuffix(".weight")
            reachable = [degree * steps[layer] for degree in range(1, most[layer] + 1)]
            assert row.kept in reachable
            assert abs(row.kept - counts[row.name]) == min(abs(n - counts[row.name]) for n in reachable)
            assert row.requested == counts[row.name]
    assert kept[0].masks == dense
    assert "+0 against" in kept[0].summary()


def test_draws_depend_on_seed_and_layer_name_alone(net: nn.Module) -> None:
    dense = Masks.dense(net)
    for section in KINDS:
        section = replace(section, degree=2)
        first = graphs.prune(net, dense, section, None, 1)
        torch.manual_seed(5)
        np.random.seed(5)  # noqa: NPY002
        assert graphs.prune(net, dense, section, None, 1) == first
        alone = graphs.prune(net, Masks({"same.weight": dense["same.weight"]}), section, None, 1)
        assert torch.equal(alone["same.weight"], first["same.weight"])
        assert graphs.prune(net, dense, section, None, 2) != first
        assert not torch.equal(first["same.weight"], first["grouped.weight"])


def test_drawing_leaves_the_global_random_states_alone(net: nn.Module) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state(), str(np.random.get_state())  # noqa: NPY002
    graphs.build(net, Masks.dense(net), replace(PAPER, degree=2), None, 0)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert str(np.random.get_state()) == before[1]  # noqa: NPY002


def test_mistakes_name_their_key(net: nn.Module) -> None:
    dense = Masks.dense(net)
    with pytest.raises(UserError, match=r"graph\.degree"):
        graphs.prune(net, dense, SIMPLE, None, 0)
    with pytest.raises(UserError, match="did you mean 'xnet'"):
        graphs.prune(net, dense, Graph(kind="xnt", degree=2), None, 0)
    holed = Masks({name: torch.zeros_like(m) if name == "first.weight" else m for name, m in dense.items()})
    with pytest.raises(UserError, match=r"432 weights are pruned already; remove pruning\.mask_file"):
        graphs.prune(net, holed, replace(SIMPLE, degree=2), None, 0)


PUBLISHED = [  # model, left dense, degree, percent of the masked layers' weights: X-Net, rreg
    ("cifar/vgg16_bn_head512", ["classifier.3.weight"], 3, 0.68, 0.77),
    ("cifar/vgg16_bn_head512", ["classifier.3.weight"], 15, 3.40, 3.73),
    ("cifar/vgg16_bn_head512", ["classifier.3.weight"], 30, 6.80, 7.25),
    ("cifar/vgg16_bn_head512", ["classifier.3.weight"], 60, 13.60, 13.80),
    ("torchvision/resnet18", ["conv1.weight", "fc.weight"], 3, 0.83, 0.95),
    ("torchvision/resnet50", ["conv1.weight", "fc.weight"], 3, 0.67, 0.84),
]


@pytest.mark.parametrize(("name", "dense", "degree", "xnet", "rreg"), PUBLISHED)
def test_densities_of_the_published_networks(
    name: str, dense: list[str], degree: int, xnet: float, rreg: float
) -> None:
    with torch.device("meta"):
        model = models.build(name, 10)
    masks = Masks.dense(model, dense)
    rounding = 0.005
    # One draw each. An edge is 9 weights at most, and the number of edges varies by at most its square root.
    spread = 100 * math.sqrt(sum(9**2 * degree * max(m.shape[:2]) for m in masks.values())) / masks.total
    for section, percent, error in (
        (XNET, xnet, rounding),
        (RANDOM, xnet, rounding + 4 * spread),
        (replace(PAPER, tries=1), rreg, rounding + 0.004 * rreg),
    ):
        found = graphs.prune(model, masks, replace(section, degree=degree), None, 0)
        assert 100 * found.density == pytest.approx(percent, abs=error)


def test_live_parameters_of_vgg16_at_degree_three() -> None:
    """X-Net: 3 edges of 9 weights per input of 13 convolutions, 3 weights per input of the linear layer."""
    with torch.device("meta"):
        model = models.build("cifar/vgg16_bn_head512", 10)
    found = graphs.prune(model, Masks.dense(model, ["classifier.3.weight"]), replace(XNET, degree=3), None, 0)
    inputs = 3 + 2 * 64 + 2 * 128 + 3 * 256 + 5 * 512
    assert inputs == 3715
    assert found.kept == 27 * inputs + 3 * 512
    norms, biases, last = 2 * 4224, 512, 5130
    assert round((found.kept + norms + biases + last) / 1e6, 3) == 0.116
