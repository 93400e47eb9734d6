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


def as_tensors(pool: Pool) -> Pool:
    return replace(pool, layers=tuple(replace(one, values=torch.from_numpy(one.scores)) for one in pool.layers))


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
def test_every_allocation_and_pattern_chooses_the_same(section: Pruning, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = {name: shape for name, shape in SHAPES.items() if section.pattern != "2:4" or name != "stem"}
    masks = Masks({name: torch.ones(shape, dtype=torch.bool) for name, shape in shapes.items()})
    scores = {name: torch.randint(0, 9, shape, generator=generator).float() for name, shape in shapes.items()}
    here = choose(scores, masks, 0.5, section, seed=0)
    monkeypatch.setattr(select, "_flat", lambda scores: scores)
    there = choose(scores, masks, 0.5, section, seed=0)
    assert there == here != masks
