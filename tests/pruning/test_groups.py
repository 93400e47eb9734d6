"""Whole groups against a plain greedy loop over sorted groups, and against all subsets where sizes are equal."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.params.pattern import parse
from utils.pruning.groups import Groups, choose_groups, cost, grouped
from utils.pruning.select import Layer, Pool, priority

VALUES = st.sampled_from([-math.inf, -2.0, 0.0, -0.0, 0.5, 1.0, 1.0, 3.0, math.inf])


def groups(name: str, scores: list[float], sizes: list[int], key: int = 0, least: int = 0) -> Groups:
    held = np.array(sizes, dtype=np.int64)
    return Groups(
        name, (sum(sizes),), np.array(scores, np.float64), held > 0, key, cost(least, held),
        weights=sum(sizes), sizes=held, least=least,
    )  # fmt: skip


@st.composite
def layers(draw: st.DrawFn, sizes: st.SearchStrategy[int], floors: bool = False) -> list[Groups]:
    found = []
    for index in range(draw(st.integers(1, 4))):
        number = draw(st.integers(1, 6))
        held = draw(st.lists(sizes, min_size=number, max_size=number))
        scores = draw(st.lists(VALUES, min_size=number, max_size=number))
        least = draw(st.integers(0, min(5, sum(held)))) if floors else 0
        found.append(groups(f"layer{index}", scores, held, draw(st.integers(0, 9)), least))
    return found


def best_first(pool: list[Groups]) -> list[tuple[int, int]]:
    """(layer, group) of every live group, best first, ties by priority, then layer, then group."""
    every = [(i, g) for i, layer in enumerate(pool) for g in range(len(layer.sizes)) if layer.sizes[g]]
    place = [priority(layer.key, np.arange(len(layer.sizes))) for layer in pool]
    return sorted(every, key=lambda at: (-pool[at[0]].scores[at[1]], place[at[0]][at[1]], at))


def greedy(pool: list[Groups], keep: int) -> set[tuple[int, int]]:
    """Floors, then one by one from the best down, passing over what does not fit."""
    order, taken = best_first(pool), set()
    for i, layer in enumerate(pool):
        held = 0
        for at in order:
            if at[0] == i and held < layer.least:
                taken.add(at)
                held += int(layer.sizes[at[1]])
    room = keep - sum(int(pool[i].sizes[g]) for i, g in taken)
    assert room >= 0
    for at in order:
        size = int(pool[at[0]].sizes[at[1]])
        if at not in taken and size <= room:
            taken.add(at)
            room -= size
    return taken


def places(pool: list[Groups], chosen: dict[str, np.ndarray]) -> set[tuple[int, int]]:
    return {(i, int(g)) for i, layer in enumerate(pool) for g in np.flatnonzero(chosen[layer.name])}


@given(layers(st.integers(0, 5), floors=True), st.data())
@settings(max_examples=400, deadline=None)
def test_one_pool_is_greedy_from_the_best_down(pool: list[Groups], data: st.DataObject) -> None:
    keep = data.draw(st.integers(sum(layer.floor for layer in pool), sum(layer.alive for layer in pool)))
    found = choose_groups([Pool(tuple(pool), keep)])
    assert places(pool, found) == greedy(pool, keep)
    for layer in pool:
        assert layer.sizes[found[layer.name]].sum() >= layer.least


@given(layers(st.sampled_from([0, 3])), st.integers(0, 72))
@settings(max_examples=150, deadline=None)
def test_equal_sizes_are_the_best_of_all_subsets(pool: list[Groups], keep: int) -> None:
    keep = min(keep, sum(layer.alive for layer in pool))
    live = [(i, g) for i, layer in enumerate(pool) for g in range(len(layer.sizes)) if layer.sizes[g]]
    if math.comb(len(live), keep // 3) > 3000:
        return
    found = places(pool, choose_groups([Pool(tuple(pool), keep)]))
    assert len(found) == keep // 3

    def worth(subset: tuple[tuple[int, int], ...]) -> list[float]:
        return sorted((float(pool[i].scores[g]) for i, g in subset), reverse=True)

    assert worth(tuple(found)) == max(map(worth, itertools.combinations(live, keep // 3)))


@given(layers(st.integers(0, 5), floors=True), st.data())
@settings(max_examples=300, deadline=None)
def test_what_layers_leave_is_handed_on_until_nothing_fits(pool: list[Groups], data: st.DataObject) -> None:
    keeps = [data.draw(st.integers(layer.floor, layer.alive)) for layer in pool]
    found = choose_groups([Pool((layer,), keep) for layer, keep in zip(pool, keeps, strict=True)])
    held = sum(int(layer.sizes[found[layer.name]].sum()) for layer in pool)
    assert held <= sum(keeps)
    for layer, keep in zip(pool, keeps, strict=True):
        out = layer.sizes[~found[layer.name]]
        assert not ((out > 0) & (out <= sum(keeps) - held)).any()
        assert {(0, g) for _, g in greedy([layer], keep)} <= places([layer], found)
        assert layer.sizes[found[layer.name]].sum() >= layer.least


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 24)), min_size=1, max_size=5), st.integers(1, 5))
@settings(max_examples=200, deadline=None)
def test_equal_sizes_are_rounded_by_largest_remainder_in_groups(cases: list[tuple[int, int]], size: int) -> None:
    pool = [groups(f"layer{i}", list(range(n)), [size] * n) for i, (n, _) in enumerate(cases)]
    keeps = [min(keep, n * size) for n, keep in cases]
    found = choose_groups([Pool((layer,), keep) for layer, keep in zip(pool, keeps, strict=True)])
    whole = [keep // size for keep in keeps]
    by_remainder = sorted(range(len(pool)), key=lambda i: (-(keeps[i] % size), i))
    for i in by_remainder[: sum(keeps) // size - sum(whole)]:
        whole[i] += 1
    assert [int(found[layer.name].sum()) for layer in pool] == whole


def test_a_group_scores_the_mean_or_sum_of_its_live_weights_in_float64() -> None:
    scores = np.array([1, 2, 4, 1e8, 1, -1e8, 7, 9, 8], np.float32)
    live = np.array([1, 1, 0, 1, 1, 1, 0, 0, 0], bool)
    layer = Layer("w", (3, 3), scores, live)
    mean = grouped(layer, parse("channel"), "mean")
    assert mean.scores.tolist() == [1.5, 1 / 3, 0.0]
    assert mean.scores.dtype == np.float64
    assert grouped(layer, parse("channel"), "sum").scores.tolist() == [3.0, 1.0, 0.0]
    assert mean.sizes.tolist() == [2, 3, 0]
    assert mean.live.tolist() == [True, True, False]
    assert (mean.size, mean.alive) == (9, 5)


def test_dead_and_infinite_scores() -> None:
    inf = math.inf
    scores = np.array([[inf, -inf, 3.0], [inf, inf, -inf], [-inf, 5.0, 5.0], [-inf, 1.0, 1.0]], np.float32)
    live = np.ones((4, 3), bool)
    live[3, 0] = False
    layer = Layer("w", (4, 3), scores.reshape(-1), live.reshape(-1))
    assert grouped(layer, parse("channel"), "sum").scores.tolist() == [3.0, inf, -inf, 2.0]
    assert grouped(layer, parse("channel"), "mean").scores.tolist() == [1.0, inf, -inf, 1.0]


@given(st.lists(st.integers(0, 6), min_size=1, max_size=6), st.integers(0, 40))
@settings(max_examples=200, deadline=None)
def test_the_cost_of_a_floor_bounds_every_order(sizes: list[int], floor: int) -> None:
    floor = min(floor, sum(sizes))
    worst = 0
    for order in itertools.permutations([size for size in sizes if size]):
        total = 0
        for size in order:
            if total >= floor:
                break
            total += size
        worst = max(worst, total)
    bound = cost(floor, np.array(sizes))
    assert worst <= bound <= sum(sizes)
    if len({size for size in sizes if size}) == 1:
        assert bound == worst


@pytest.mark.parametrize("tied", [False, True])
def test_a_million_groups_of_mixed_sizes(tied: bool) -> None:
    rng = np.random.default_rng(0)
    sizes = rng.choice([1, 9, 49], 1_000_000)
    scores = np.zeros(len(sizes)) if tied else rng.random(len(sizes))
    layer = groups("w", [], [])
    layer = Groups("w", (int(sizes.sum()),), scores, sizes > 0, 3, weights=int(sizes.sum()), sizes=sizes)
    keep = int(sizes.sum()) // 10
    found = choose_groups([Pool((layer,), keep)])["w"]
    order = np.lexsort((priority(3, np.arange(len(sizes))), -scores))
    room, expected = keep, np.zeros(len(sizes), bool)
    for at, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        if size <= room:
            expected[at], room = True, room - size
    assert np.array_equal(found, expected)
