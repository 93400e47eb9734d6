"""Exact selection against a full sort, ties against the documented order."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.pruning import select
from utils.pruning.select import Layer, Pool, covers, kept_count, layers_of, top

VALUES = st.sampled_from([-math.inf, -2.5, -1.0, -0.0, 0.0, 1e-45, 0.5, 1.0, math.inf])
FINE = st.floats(allow_nan=False, width=32)


@st.composite
def pools(draw: st.DrawFn) -> Pool:
    """A pool of one to four layers, some weights dead, with scores from few values (many ties) or from all floats."""
    source = draw(st.sampled_from([VALUES, FINE]))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    layers = []
    for index in range(draw(st.integers(1, 4))):
        size = draw(st.integers(1, 12))
        scores = np.array(draw(st.lists(source, min_size=size, max_size=size)), dtype=dtype)
        live = np.array(draw(st.lists(st.booleans(), min_size=size, max_size=size)))
        layers.append(Layer(f"layer{index}", (size,), scores, live, key=draw(st.integers(0, 2**63 - 1))))
    return Pool(tuple(layers), draw(st.integers(0, sum(int(layer.live.sum()) for layer in layers))))


@given(pools())
@settings(max_examples=300, deadline=None)
def test_keeps_the_best_live_weights_and_exactly_as_many_as_asked(pool: Pool) -> None:
    masks = top(pool)
    kept, live = [], []
    for layer in pool.layers:
        mask = masks[layer.name].numpy()
        assert not (mask & ~layer.live).any()
        kept += layer.scores[mask].tolist()
        live += layer.scores[layer.live].tolist()
    assert len(kept) == pool.keep
    assert sorted(kept) == sorted(live, reverse=True)[: pool.keep][::-1]


def _split_mix(x: int) -> int:
    wrap = 2**64 - 1
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & wrap
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & wrap
    return x ^ (x >> 31)


def _hash(seed: int, name: str, index: int) -> int:
    """The tie order from its description, in plain integers: the top 53 bits of two rounds of SplitMix64."""
    golden, wrap = 0x9E3779B97F4A7C15, 2**64 - 1
    key = int.from_bytes(hashlib.sha256(f"ties\x1f{seed}\x1f{name}".encode()).digest()[:8], "little") >> 1
    return _split_mix((_split_mix((key + index * golden) & wrap) + golden) & wrap) >> 11


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 77])
def test_ties_follow_the_documented_seeded_order(monkeypatch: pytest.MonkeyPatch, seed: int, there: bool) -> None:
    """there: by the way of scores that lie on a GPU."""
    if there:
        monkeypatch.setattr(select, "_flat", lambda scores: scores)
    masks = {"a": torch.ones(3, 20, dtype=torch.bool), "b": torch.ones(40, dtype=torch.bool)}
    masks["b"][:5] = False
    scores = {"a": torch.zeros(3, 20), "b": torch.zeros(40)}
    scores["a"][1, 3] = 2.0
    scores["b"][30] = -1.0
    chosen = top(Pool(tuple(layers_of(scores, masks, seed)), 31))
    tied = [("a", i) for i in range(60) if i != 23] + [("b", i) for i in range(5, 40) if i != 30]
    best = sorted(tied, key=lambda place: _hash(seed, *place))[:30]
    expected = {("a", 23), *best}
    assert {(name, int(i)) for name in masks for i in chosen[name].reshape(-1).nonzero()} == expected


def test_equal_hashes_fall_back_to_layer_then_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("utils.pruning.select.priority", lambda key, index: np.where(index == 3, 0.0, 0.5))
    layers = tuple(Layer(n, (4,), np.zeros(4, np.float32), np.ones(4, bool)) for n in "ab")
    chosen = top(Pool(layers, 6))
    assert chosen["a"].tolist() == [True] * 4
    assert chosen["b"].tolist() == [True, False, False, True]


def test_ties_are_spread_and_change_with_the_seed() -> None:
    masks = {"w": torch.ones(10_000, dtype=torch.bool)}
    scores = {"w": torch.full((10_000,), 3.0)}
    first, again, other = (top(Pool(tuple(layers_of(scores, masks, s)), 5000))["w"] for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert 2000 < int((first & other).sum()) < 3000
    assert 2300 < int(first[:5000].sum()) < 2700


def test_minus_zero_ties_with_zero() -> None:
    masks = {"w": torch.ones(200, dtype=torch.bool)}
    mixed = torch.zeros(200)
    mixed[::2] = -0.0
    a = top(Pool(tuple(layers_of({"w": mixed}, masks, 0)), 77))["w"]
    b = top(Pool(tuple(layers_of({"w": torch.zeros(200)}, masks, 0)), 77))["w"]
    assert torch.equal(a, b)


def test_memory_layout_does_not_matter() -> None:
    scores = torch.randint(0, 3, (8, 4, 3, 3), generator=torch.Generator().manual_seed(0)).float()
    masks = {"w": torch.ones(8, 4, 3, 3, dtype=torch.bool)}
    results = [
        top(Pool(tuple(layers_of({"w": s}, masks, 5)), 100))["w"]
        for s in (scores, scores.contiguous(memory_format=torch.channels_last))
    ]
    assert torch.equal(*results)


@pytest.mark.parametrize("difference", [1e-12, -1e-12])
def test_one_float64_layer_is_compared_in_float64(difference: float) -> None:
    masks = {"a": torch.ones(1, dtype=torch.bool), "b": torch.ones(1, dtype=torch.bool)}
    scores = {"a": torch.tensor([1.0]), "b": torch.tensor([1.0 + difference], dtype=torch.float64)}
    chosen = top(Pool(tuple(layers_of(scores, masks, 0)), 1))
    assert (chosen["a"].item(), chosen["b"].item()) == (difference < 0, difference > 0)


@pytest.mark.parametrize("keep", [-1, 5])
def test_asking_for_more_than_lives_is_an_error(keep: int) -> None:
    layer = Layer("w", (6,), np.zeros(6, np.float32), np.array([1, 1, 1, 1, 0, 0], bool))
    with pytest.raises(ValueError, match="4 live weights"):
        top(Pool((layer,), keep))


def test_selection_does_not_touch_its_inputs() -> None:
    scores, live = np.array([3, 1, 2, 2, 9], np.float32), np.array([1, 1, 1, 1, 0], bool)
    layer = Layer("w", (5,), scores.copy(), live.copy())
    chosen = top(Pool((layer,), 2))["w"]
    assert np.array_equal(layer.scores, scores)
    assert np.array_equal(layer.live, live)
    assert int(chosen.sum()) == 2


def test_covers_finds_missing_doubled_and_overfull_layers() -> None:
    a, b = (Layer(name, (3,), np.zeros(3, np.float32), np.ones(3, bool)) for name in "ab")
    assert covers([Pool((a,), 3), Pool((b,), 0)], [a, b])
    assert not covers([Pool((a,), 3)], [a, b])
    assert not covers([Pool((a, b), 3), Pool((b,), 0)], [a, b])
    assert not covers([Pool((a,), 4), Pool((b,), 0)], [a, b])


@pytest.mark.parametrize(
    ("density", "weights", "kept"), [(0.5, 3, 2), (0.5, 5, 3), (0.1, 4, 0), (0.0, 9, 0), (1.0, 9, 9)]
)
def test_kept_count_rounds_half_up(density: float, weights: int, kept: int) -> None:
    assert kept_count(density, weights) == kept


@pytest.mark.parametrize("tied", [False, True])
def test_twenty_million_scores(tied: bool) -> None:
    size, keep = 20_000_000, 1_999_999
    scores = torch.rand(size, generator=torch.Generator().manual_seed(3))
    if tied:
        scores = (scores * 4).floor()
    layers = tuple(
        Layer(f"{i}", (size // 4,), part.numpy(), np.ones(size // 4, bool), i)
        for i, part in enumerate(scores.split(size // 4))
    )
    mask = torch.cat(list(top(Pool(layers, keep)).values()))
    assert int(mask.count_nonzero()) == keep
    lowest_kept, highest_dropped = scores[mask].min(), scores[~mask].max()
    assert lowest_kept == highest_dropped if tied else lowest_kept >= highest_dropped


@given(pools(), st.lists(st.integers(0, 4), min_size=4, max_size=4), st.data())
@settings(max_examples=300, deadline=None)
def test_floors_first_then_the_best_of_all_others(pool: Pool, floors: list[int], data: st.DataObject) -> None:
    layers = tuple(
        replace(layer, floor=min(floor, layer.alive)) for layer, floor in zip(pool.layers, floors, strict=False)
    )
    keep = data.draw(st.integers(sum(layer.floor for layer in layers), sum(layer.alive for layer in layers)))
    masks = top(Pool(layers, keep))
    kept = {layer.name: set(np.flatnonzero(masks[layer.name].numpy()).tolist()) for layer in layers}
    assert sum(map(len, kept.values())) == keep
    ranked = {
        layer.name: sorted(np.flatnonzero(layer.live).tolist(), key=lambda i: -layer.scores[i]) for layer in layers
    }
    spare: list[float] = []
    extra: list[float] = []
    for layer in layers:
        best = [float(layer.scores[i]) for i in ranked[layer.name]]
        mine = sorted((float(layer.scores[i]) for i in kept[layer.name]), reverse=True)
        assert mine == best[: len(mine)]
        assert len(mine) >= layer.floor
        spare += best[layer.floor :]
        extra += mine[layer.floor :]
    assert sorted(extra, reverse=True) == sorted(spare, reverse=True)[: len(extra)]


def test_floors_follow_the_same_tie_order() -> None:
    masks = {"a": torch.ones(50, dtype=torch.bool), "b": torch.ones(50, dtype=torch.bool)}
    scores = {"a": torch.zeros(50), "b": torch.ones(50)}
    plain = tuple(layers_of(scores, masks, 3))
    floored = tuple(replace(layer, floor=7) for layer in plain)
    chosen = top(Pool(floored, 20))
    assert torch.equal(chosen["a"], top(Pool(plain[:1], 7))["a"])
    assert torch.equal(chosen["b"], top(Pool(plain[1:], 13))["b"])
    with pytest.raises(ValueError, match="cannot keep 13 of 100 live weights with floors of 14"):
        top(Pool(floored, 13))
    assert not covers([Pool(floored, 13)], floored)
    assert covers([Pool(floored, 14)], floored)
