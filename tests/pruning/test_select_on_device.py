"""Selection on the scores' device, here the CPU: thresholds of a full sort, and the masks of the CPU's own way."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from utils.masks import Masks
from utils.params.pruning import Pruning
from utils.pruning import kth, select, select_on_device
from utils.pruning.choose import choose
from utils.pruning.select import Layer, Pool, top

FEW = st.sampled_from([-math.inf, -2.5, -0.0, 0.0, 1e-45, 0.5, 1.0, math.inf])
FINE = st.floats(allow_nan=False, width=32)
SHAPES = {"stem": (8, 3, 3, 3), "point": (16, 8, 1, 1), "fc": (10, 16)}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Samples so small that a hundred scores take the way of millions."""
    for module in (kth, select_on_device):
        monkeypatch.setattr(module, "SAMPLE", 8)
    return monkeypatch


@st.composite
def pools(draw: st.DrawFn) -> Pool:
    """One to three layers on the CPU's way, some weights dead, between none and all of them to be kept."""
    dtype, source = draw(st.sampled_from([np.float32, np.float64])), draw(st.sampled_from([FEW, FINE]))
    layers = []
    for index in range(draw(st.integers(1, 3))):
        size = draw(st.integers(1, 40))
        scores = np.array(draw(st.lists(source, min_size=size, max_size=size)), dtype=dtype)
        alike = draw(st.sampled_from([True, False, None]))
        live = np.array([draw(st.booleans()) if alike is None else alike for _ in range(size)])
        layers.append(Layer(f"layer{index}", (size,), scores, live, draw(st.integers(0, 2**63 - 1))))
    return Pool(tuple(layers), draw(st.integers(0, sum(layer.alive for layer in layers))))


def as_tensors(pool: Pool, there: bool = False) -> Pool:
    """there: with the live masks, too."""
    return replace(pool, layers=tuple(
        replace(one, values=torch.from_numpy(one.scores), there=torch.from_numpy(one.live.copy()) if there else None)
        for one in pool.layers
    ))  # fmt: skip


def hashes(key: int, count: int) -> np.ndarray:
    """The tie order from its description: the top 53 bits of two rounds of SplitMix64."""

    def mix(x: np.ndarray) -> np.ndarray:
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))

    golden = np.uint64(0x9E3779B97F4A7C15)
    places = np.arange(count, dtype=np.uint64) * golden + np.uint64(key)
    return (mix(mix(places) + golden)) >> np.uint64(11)


def from_a_sort(layers: tuple[Layer, ...], keep: int) -> dict[str, np.ndarray]:
    """The masks of one sort of all layers in numpy, by (score, hash); layers and indices are in order already."""
    live = np.concatenate([layer.live for layer in layers])
    scores = np.concatenate([layer.scores for layer in layers])
    order = np.concatenate([hashes(layer.key, layer.size) for layer in layers])
    mask = np.zeros(len(live), dtype=bool)
    mask[np.lexsort((order, -scores, ~live))[:keep]] = True
    parts = np.split(mask, np.cumsum([layer.size for layer in layers])[:-1])
    return {layer.name: part for layer, part in zip(layers, parts, strict=True)}


@given(pools(), st.sampled_from([6.0, 0.5, 0.0]))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_keeps_the_best_and_the_same_of_equals(small: pytest.MonkeyPatch, pool: Pool, deviations: float) -> None:
    """Brackets that hold the threshold, that may miss it, and that are a single value."""
    small.setattr(kth, "_DEVIATIONS", deviations)
    there, here = top(as_tensors(pool)), top(pool)
    kept = [score for layer in pool.layers for score in layer.scores[there[layer.name].numpy()].tolist()]
    live = [score for layer in pool.layers for score in layer.scores[layer.live].tolist()]
    assert sorted(kept) == sorted(live)[len(live) - pool.keep :]
    assert all(torch.equal(there[name], mask) for name, mask in here.items())


@given(pools(), st.booleans(), st.integers(0, 3))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_live_masks_on_the_device_give_the_masks_of_a_sort(
    small: pytest.MonkeyPatch, pool: Pool, there: bool, floor: int
) -> None:
    given_ = as_tensors(pool, there)
    before = [None if layer.there is None else layer.there.clone() for layer in given_.layers]
    chosen, expected = top(given_), from_a_sort(pool.layers, pool.keep)
    for layer in pool.layers:
        assert np.array_equal(chosen[layer.name].numpy(), expected[layer.name])
    floors = [min(floor, layer.alive) for layer in pool.layers]
    if len(floors) > 1 and sum(floors) <= pool.keep:
        floored = replace(given_, layers=tuple(map(lambda a, b: replace(a, floor=b), given_.layers, floors)))
        firsts = {}
        for layer, own in zip(pool.layers, floors, strict=True):
            firsts.update(from_a_sort((layer,), own))
        others = tuple(replace(layer, live=layer.live & ~firsts[layer.name]) for layer in pool.layers)
        rest = from_a_sort(others, pool.keep - sum(floors))
        for name, mask in top(floored).items():
            assert np.array_equal(mask.numpy(), firsts[name] | rest[name])
    for layer, old in zip(given_.layers, before, strict=True):
        assert old is None or (layer.there is not None and torch.equal(layer.there, old))


@pytest.mark.parametrize("way", ["sampled", "sorted"])
def test_nan_is_refused_unless_it_is_dead(small: pytest.MonkeyPatch, way: str) -> None:
    if way == "sorted":
        small.setattr(select_on_device, "SAMPLE", 1000)
    for place in range(40):
        scores = torch.arange(40.0)
        scores[place] = math.nan
        live = np.ones(40, bool)
        layer = Layer("w", (40,), scores, live)
        with pytest.raises(ValueError, match="NaN among the scores"):
            top(Pool((layer,), 20))
        live[place] = False
        assert int(top(Pool((replace(layer, live=live),), 20))["w"].count_nonzero()) == 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("steps", [0, 4])
def test_a_million_scores(dtype: torch.dtype, steps: int) -> None:
    """Without ties, and with a quarter of them tied at the threshold."""
    generator = torch.Generator().manual_seed(3)
    scores = torch.rand(1_000_000, generator=generator, dtype=dtype)
    scores = (scores * steps).floor() if steps else scores
    live = torch.rand(len(scores), generator=generator) < 0.7
    layers = tuple(
        Layer(f"{i}", (250_000,), one, alive.numpy(), i)
        for i, (one, alive) in enumerate(zip(scores.split(250_000), live.split(250_000), strict=True))
    )
    mask = torch.cat(list(top(Pool(layers, 100_000)).values()))
    assert int(mask.count_nonzero()) == 100_000
    assert not (mask & ~live).any()
    assert torch.equal(scores[mask].sort().values, scores[live].sort().values[-100_000:])


@pytest.mark.parametrize("section", [
    Pruning(), Pruning(min_kept=5), Pruning(allocation="erk"), Pruning(normalize="lamp"), Pruning(pattern="block=1x4"),
    Pruning(pattern="2:4"), Pruning(pattern="channel"), Pruning(layer_densities=("fc=0.9",)),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("alive", [1.0, 0.95])
def test_every_allocation_and_pattern_chooses_the_same(
    section: Pruning, alive: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = {name: shape for name, shape in SHAPES.items() if section.pattern != "2:4" or name != "stem"}
    share = 1.0 if section.pattern == "2:4" else alive  # what lives must fill every group
    masks = Masks({name: torch.rand(shape, generator=generator) < share for name, shape in shapes.items()})
    scores = {name: torch.randint(0, 9, shape, generator=generator).float() for name, shape in shapes.items()}
    here = choose(scores, masks, 0.5, section, seed=0)
    monkeypatch.setattr(select, "_flat", lambda scores: scores)
    there = choose(scores, masks, 0.5, section, seed=0)
    assert there == here != masks
