"""Counts per layer against oracles that share no code with them: bisection in 80 digits, integer water-filling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.pruning.allocations import allocation, fill
from utils.pruning.select import Layer, kept_count

Shape = tuple[int, ...]


def resnet(blocks: Sequence[int], bottleneck: bool) -> list[Shape]:
    """Conv and Linear weight shapes of the ImageNet ResNets, in the order of their parameters."""
    shapes: list[Shape] = [(64, 3, 7, 7)]
    width_in = 64
    for stage, count in enumerate(blocks):
        width = 64 * 2**stage
        out = width * 4 if bottleneck else width
        for block in range(count):
            if bottleneck:
                shapes += [(width, width_in, 1, 1), (width, width, 3, 3), (out, width, 1, 1)]
            else:
                shapes += [(width, width_in, 3, 3), (width, width, 3, 3)]
            if block == 0 and width_in != out:
                shapes.append((out, width_in, 1, 1))
            width_in = out
    return [*shapes, (1000, width_in)]


NETS = {"resnet18": resnet([2, 2, 2, 2], False), "resnet50": resnet([3, 4, 6, 3], True)}


def test_the_shape_lists_are_those_of_the_nets() -> None:
    assert sum(map(math.prod, NETS["resnet18"])) == 11_678_912
    assert sum(map(math.prod, NETS["resnet50"])) == 25_502_912


def layer(index: int, shape: Shape, alive: int | None = None) -> Layer:
    size = math.prod(shape)
    live = np.arange(size) < (size if alive is None else alive)
    return Layer(f"layer{index}", shape, np.zeros(size, np.float32), live)


def counts(kind: str, layers: Sequence[Layer], keep: int) -> list[int]:
    """What a layer-wise allocation gives each layer, in order."""
    pools = allocation[kind](layers, keep)
    assert [pool.layers for pool in pools] == [(one,) for one in layers]
    return [pool.keep for pool in pools]


def density_weight(kind: str, shape: Shape) -> Decimal:
    """Per-weight density of a layer up to one common factor, as the papers write it."""
    size = Decimal(math.prod(shape))
    if kind == "erk":
        return Decimal(sum(shape)) / size
    if kind == "er":
        return Decimal(shape[0] + shape[1]) / Decimal(shape[0] * shape[1])
    return Decimal(1) if kind == "uniform" else 1 / size


def bisected(kind: str, shapes: Sequence[Shape], caps: Sequence[int], keep: int) -> list[int]:
    """Bisection on the common factor until sum(min(cap, factor * weight * size)) is `keep`, then largest remainder."""
    with localcontext() as context:
        context.prec = 80
        shares = [density_weight(kind, shape) * math.prod(shape) for shape in shapes]
        low = Decimal(0)
        high = max((cap / share for cap, share in zip(caps, shares, strict=True)), default=Decimal(1)) + 1
        for _ in range(250):
            middle = (low + high) / 2
            held = sum(min(Decimal(cap), middle * share) for cap, share in zip(caps, shares, strict=True))
            low, high = (middle, high) if held <= keep else (low, middle)
        quotas = [
            min(Decimal(cap), low * share).quantize(Decimal(10) ** -40) for cap, share in zip(caps, shares, strict=True)
        ]
        whole = [int(quota) for quota in quotas]
        remainders = [(-(quota - count), i) for i, (quota, count) in enumerate(zip(quotas, whole, strict=True))]
        for _, i in sorted(remainders)[: keep - sum(whole)]:
            whole[i] += 1
    return whole


@pytest.mark.parametrize("kind", ["erk", "er", "uniform", "balanced"])
@pytest.mark.parametrize("density", [0.8, 0.5, 0.2, 0.1, 0.01])
@pytest.mark.parametrize("net", NETS)
def test_resnets_agree_with_bisection_to_the_weight(net: str, density: float, kind: str) -> None:
    shapes = NETS[net]
    sizes = [math.prod(shape) for shape in shapes]
    keep = math.floor(density * sum(sizes) + 0.5)
    found = counts(kind, [layer(i, shape) for i, shape in enumerate(shapes)], keep)
    assert sum(found) == keep
    assert found == bisected(kind, shapes, sizes, keep)


@pytest.mark.parametrize("density", [0.8, 0.5])
def test_erk_hands_the_excess_of_dense_layers_on(density: float) -> None:
    shapes = NETS["resnet18"]
    sizes = np.array([math.prod(shape) for shape in shapes])
    keep = math.floor(density * sizes.sum() + 0.5)
    clamped = np.minimum(sizes, keep * np.array([sum(s) for s in shapes]) / sum(map(sum, shapes)))
    assert clamped.sum() < 0.9 * keep  # what clamping alone would reach
    found = np.array(counts("erk", [layer(i, shape) for i, shape in enumerate(shapes)], keep))
    assert found.sum() == keep
    dense = found == sizes
    assert dense.any()
    factors = found[~dense] / np.array([sum(s) for s, full in zip(shapes, dense, strict=True) if not full])
    assert np.ptp(factors) / factors.mean() < 1e-3


def integer_level(sizes: Sequence[int], keep: int) -> list[int]:
    """Water-filling in whole numbers: the highest level c that fits, the rest one by one to the first open layers."""
    low, high = 0, max(sizes, default=0)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if sum(min(size, middle) for size in sizes) <= keep else (low, middle - 1)
    found = [min(size, low) for size in sizes]
    rest = keep - sum(found)
    for i, size in enumerate(sizes):
        if rest and size > low:
            found[i] += 1
            rest -= 1
    return found


@given(st.lists(st.integers(1, 500), min_size=1, max_size=12), st.data())
@settings(max_examples=200, deadline=None)
def test_balanced_is_integer_water_filling(sizes: list[int], data: st.DataObject) -> None:
    keep = data.draw(st.integers(0, sum(sizes)))
    assert counts("balanced", [layer(i, (size, 1)) for i, size in enumerate(sizes)], keep) == integer_level(sizes, keep)


shapes_and_live = st.lists(
    st.one_of(st.tuples(st.integers(1, 9), st.integers(1, 9)), st.tuples(*[st.integers(1, 5)] * 4)),
    min_size=1,
    max_size=9,
).flatmap(lambda shapes: st.tuples(st.just(shapes), st.tuples(*[st.integers(0, math.prod(s)) for s in shapes])))


@pytest.mark.parametrize("kind", ["erk", "er", "uniform", "balanced"])
@given(case=shapes_and_live, share=st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_layers_are_capped_at_what_survives(kind: str, case: tuple[list[Shape], tuple[int, ...]], share: float) -> None:
    shapes, alive = case
    keep = math.floor(share * sum(alive) + 0.5)
    found = counts(kind, [layer(i, s, n) for i, (s, n) in enumerate(zip(shapes, alive, strict=True))], keep)
    assert sum(found) == keep
    assert all(0 <= count <= cap for count, cap in zip(found, alive, strict=True))
    assert found == bisected(kind, shapes, alive, keep)


def test_remainder_ties_go_to_the_earlier_layer() -> None:
    assert fill(5, [1, 1, 1], [10, 10, 10]) == [2, 2, 1]
    assert fill(1, [1, 1, 1], [10, 10, 10]) == [1, 0, 0]
    assert fill(2, [1, 1, 1], [0, 10, 10]) == [0, 1, 1]


def test_fill_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="11 weights do not fit in layers that hold 10"):
        fill(11, [1, 2], [4, 6])
    with pytest.raises(ValueError, match="do not fit"):
        fill(5, [1, 0], [4, 6])


def test_fill_of_nothing() -> None:
    assert fill(0, [], []) == []
    assert fill(0, [3, 1], [5, 5]) == [0, 0]
    assert fill(10, [3, 1], [5, 5]) == [5, 5]


def test_uniform_gives_every_layer_the_density_up_to_one_weight() -> None:
    shapes = NETS["resnet50"]
    total = sum(map(math.prod, shapes))
    found = counts("uniform", [layer(i, s) for i, s in enumerate(shapes)], kept_count(0.2, total))
    assert all(abs(count - 0.2 * math.prod(shape)) <= 1 for count, shape in zip(found, shapes, strict=True))


def test_global_is_one_pool() -> None:
    layers = [layer(0, (3, 4)), layer(1, (5,))]
    (pool,) = allocation["global"](layers, 7)
    assert (list(pool.layers), pool.keep) == (layers, 7)
    assert allocation["global"]([], 0) == []


def clamped_equal_share(sizes: Sequence[int], weights: Sequence[int], keep: int) -> list[int]:
    """ERK as published, in exact fractions: dense layers one at a time, then one factor for all others."""
    dense: set[int] = set()
    while True:
        rest = [i for i in range(len(sizes)) if i not in dense]
        left = Fraction(keep - sum(sizes[i] for i in dense))
        epsilon = left / sum(Fraction(weights[i], sizes[i]) * sizes[i] for i in rest)
        densities = {i: epsilon * Fraction(weights[i], sizes[i]) for i in rest}
        fullest = max(rest, key=lambda i: densities[i])
        if densities[fullest] <= 1:
            break
        dense.add(fullest)
    quotas = [Fraction(size) if i in dense else densities[i] * size for i, size in enumerate(sizes)]
    found = [math.floor(quota) for quota in quotas]
    for i in sorted(range(len(sizes)), key=lambda i: (found[i] - quotas[i], i))[: keep - sum(found)]:
        found[i] += 1
    return found


@pytest.mark.parametrize("density", [0.8, 0.5, 0.2, 0.1])
@pytest.mark.parametrize("net", NETS)
def test_erk_is_the_published_rule_in_fractions(net: str, density: float) -> None:
    shapes = NETS[net]
    sizes = [math.prod(shape) for shape in shapes]
    keep = math.floor(density * sum(sizes) + 0.5)
    found = counts("erk", [layer(i, shape) for i, shape in enumerate(shapes)], keep)
    assert found == clamped_equal_share(sizes, [sum(shape) for shape in shapes], keep)


def clamped(shares: Sequence[int], caps: Sequence[int], floors: Sequence[int], keep: int) -> list[int]:
    """Bisection on c in 80 digits until sum(clamp(c * share, floor, cap)) is `keep`, then largest remainder."""
    with localcontext() as context:
        context.prec = 80
        low, high = Decimal(0), Decimal(max(caps) + 1)
        for _ in range(250):
            middle = (low + high) / 2
            held = sum(
                max(Decimal(floor), min(Decimal(cap), middle * share))
                for share, cap, floor in zip(shares, caps, floors, strict=True)
            )
            low, high = (middle, high) if held <= keep else (low, middle)
        quotas = [
            max(Decimal(floor), min(Decimal(cap), low * share)).quantize(Decimal(10) ** -40)
            for share, cap, floor in zip(shares, caps, floors, strict=True)
        ]
        whole = [int(quota) for quota in quotas]
        remainders = [(-(quota - count), i) for i, (quota, count) in enumerate(zip(quotas, whole, strict=True))]
        for _, i in sorted(remainders)[: keep - sum(whole)]:
            whole[i] += 1
    return whole


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 60), st.integers(0, 12)), min_size=1, max_size=8),
    st.floats(0, 1),
)
@settings(max_examples=300, deadline=None)
def test_floors_and_caps_clamp_one_common_factor(cases: list[tuple[int, int, int]], share: float) -> None:
    shares, caps = [case[0] for case in cases], [case[1] for case in cases]
    floors = [min(least, cap) for _, cap, least in cases]
    keep = sum(floors) + math.floor(share * (sum(caps) - sum(floors)) + 0.5)
    found = fill(keep, shares, caps, floors)
    assert sum(found) == keep
    assert all(low <= count <= cap for low, count, cap in zip(floors, found, caps, strict=True))
    assert found == clamped(shares, caps, floors, keep)


def test_floors_are_paid_by_all_others() -> None:
    assert fill(100, [1, 50, 50], [500, 500, 500], [20, 0, 0]) == [20, 40, 40]
    assert fill(100, [1, 50, 50], [500, 10, 500], [20, 0, 0]) == [20, 10, 70]
    with pytest.raises(ValueError, match="9 weights are fewer than the 10 of the floors"):
        fill(9, [1, 1], [50, 50], [5, 5])


@pytest.mark.parametrize("kind", ["erk", "er", "uniform", "balanced"])
def test_layer_floors_hold_in_every_layerwise_allocation(kind: str) -> None:
    layers = [replace(layer(i, shape), floor=min(300, math.prod(shape))) for i, shape in enumerate(NETS["resnet50"])]
    keep = kept_count(0.001, sum(one.size for one in layers))
    found = counts(kind, layers, keep)
    assert sum(found) == keep
    assert min(found) >= 300


def test_from_mask_copies_ratios() -> None:
    layers = [replace(layer(i, (100, 10)), ratio=ratio) for i, ratio in enumerate([100, 300, 600, 0])]
    assert counts("from_mask", layers, 1000) == [100, 300, 600, 0]
    assert counts("from_mask", layers, 500) == [50, 150, 300, 0]
    assert counts("from_mask", layers, 2200) == [300, 900, 1000, 0]
    assert counts("from_mask", layers, 3007) == [1000, 1000, 1000, 7]
    floored = [*layers[:3], replace(layers[3], floor=40)]
    assert counts("from_mask", floored, 1040) == [100, 300, 600, 40]
    assert counts("from_mask", floored, 3100) == [1000, 1000, 1000, 100]
