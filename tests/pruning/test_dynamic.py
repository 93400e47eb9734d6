"""Masks that change in training: exact counts, growth and drop by sorting, schedules by hand, enforcement."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from utils import sparsity
from utils.masks import Masks, prunable_parameters
from utils.params.dynamic import Dynamic
from utils.params.step import Step
from utils.pruning.dynamic import MaskUpdates, UpdateSteps, build, dynamic
from utils.sparsity import Sparsity
from utils.system.errors import UserError
from utils.system.registry import declared
from utils.training.extension import Extension


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 7), nn.Linear(7, 3)
    )


def random_masks(model: nn.Module, seed: int = 1) -> Masks:
    """Another density in every layer; the last layer is dense."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, p in prunable_parameters(model).items():
        share = float(torch.rand((), generator=generator)) * 0.6 + 0.2
        found[name] = torch.rand(p.shape, generator=generator) < share
    found["5.weight"] = torch.ones(3, 7, dtype=torch.bool)
    return Masks(found)


def made(
    method: str,
    model: nn.Module,
    masks: Masks,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    total: int = 100,
    seed: int = 0,
    level: int = 0,
    prune: object = None,
    density: float | None = None,
    **section: object,
) -> tuple[MaskUpdates, Sparsity, list[Extension]]:
    held = sparsity.attach(model, optimizer, masks)
    extensions: list[Extension] = []
    values = {"method": method, "every": 10, **section}
    built = build(
        Dynamic(**values),
        total_steps=total,
        steps_per_epoch=10,
        model=model,
        sparsity=held,
        extensions=extensions,
        seed=seed,
        level=level,
        density=density,
        prune=prune,
    )
    extensions.append(built)
    return built, held, extensions


def fake_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


# When ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "every", "until", "total", "expected"),
    [
        (0, 10, 0.75, 100, [10, 20, 30, 40, 50, 60, 70]),
        (0, 10, 0.7, 100, [10, 20, 30, 40, 50, 60]),
        (5, 10, 0.5, 100, [5, 15, 25, 35, 45]),
        (40, 7, 0.5, 100, [40, 47]),
        (0, 1, 0.29, 10, [1]),
        (0, 25, 0.29, 100, [25]),
        (0, 29, 0.29, 100, []),
        (3, 100, 1.0, 4, [3]),
        (0, 4, 1.0, 4, []),
        (50, 10, 0.5, 100, []),
    ],
)
def test_update_steps(start: int, every: int, until: float, total: int, expected: list[int]) -> None:
    section = Dynamic(method="set", start=Step(0, start), every=every, until=until)
    steps = UpdateSteps.of(section, total, 10)
    assert [step for step in range(total + 50) if step in steps] == expected
    assert steps.last == (expected[-1] if expected else None)


def test_a_start_in_epochs_counts_steps() -> None:
    assert UpdateSteps.of(Dynamic(start=Step(2, 3)), 1000, 40).start == 83


def test_a_decimal_share_of_training_is_exact() -> None:
    # 0.29 * 100 is 28.999... in binary floating point.
    assert UpdateSteps.of(Dynamic(until=0.29), 100, 10).end == 29


@pytest.mark.parametrize("method", ["gmp", "rigl", "set"])
def test_update_steps_are_dense_and_replace_the_step(method: str) -> None:
    model = network()
    built, _, _ = made(method, model, Masks.dense(model), density=0.5, prune=lambda density, masks: masks)
    for step in range(120):
        update = step in (10, 20, 30, 40, 50, 60, 70)
        assert built.needs_dense_grad(step) == update
        assert built.replaces_step(step) == update


@pytest.mark.parametrize("method", ["gmp", "rigl", "set"])
def test_a_training_without_update_steps_is_refused(method: str) -> None:
    model = network()
    with pytest.raises(UserError, match=r"dynamic.every=10: no update step from dynamic.start=0it to 0.75 of 13"):
        made(method, model, Masks.dense(model), total=13, density=0.5, prune=lambda density, masks: masks)


def test_names_in_help_are_the_registered_ones() -> None:
    assert sorted(declared("dynamic")) == dynamic.names() == ["gmp", "rigl", "set"]
    assert all(declared("dynamic").values())


# Drop and grow ------------------------------------------------------------------------------------------------------


def share_by_hand(decay: str, fraction: float, step: int, end: int) -> float:
    if decay == "cosine":
        return 0.5 * fraction * (1.0 + math.cos(step * math.pi / end))
    return fraction if decay == "constant" else fraction * (1.0 - step / end)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("method", ["rigl", "set"])
def test_counts_stay_and_the_drop_is_that_of_a_sort(method: str, seed: int) -> None:
    model = network(seed)
    masks = random_masks(model, seed)
    decay = ("cosine", "constant", "linear")[seed % 3]
    fraction, step = (0.3, 0.9)[seed % 2], 10 * (1 + seed % 5)
    built, held, _ = made(method, model, masks, seed=seed, fraction=fraction, decay=decay)
    before = {name: p.detach().clone() for name, p in prunable_parameters(model).items()}
    fake_gradients(model, seed)
    gradients = {name: p.grad.clone() for name, p in prunable_parameters(model).items()}
    built.update(step)
    after = held.masks
    assert after.counts == masks.counts
    assert torch.equal(after["5.weight"], masks["5.weight"])
    for name in ("0.weight", "4.weight"):
        live = [i for i, alive in enumerate(masks[name].flatten().tolist()) if alive]
        count = int(share_by_hand(decay, fraction, step, 75) * len(live))
        sizes = before[name].abs().flatten().tolist()
        kept = set(sorted(live, key=lambda i: sizes[i])[count:])
        new = {i for i, alive in enumerate(after[name].flatten().tolist()) if alive}
        assert kept <= new
        assert count > 0
        if method == "rigl":
            slopes = gradients[name].abs().flatten().tolist()
            free = [i for i in range(len(sizes)) if i not in kept]
            grown = set(sorted(free, key=lambda i: -slopes[i])[:count])
            assert new == kept | grown
        now = prunable_parameters(model)[name].detach()
        stayed = after[name] & masks[name]
        assert torch.equal(now[stayed], before[name][stayed])
        assert not now[~stayed].any()


def test_a_weight_just_dropped_may_return_with_value_and_momentum_others_start_at_zero() -> None:
    model = nn.Sequential(nn.Linear(6, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.1, 0.2, 3.0, 4.0, 0.0, 0.0]]))
    masks = Masks({"0.weight": torch.tensor([[True, True, True, True, False, False]])})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    built, held, _ = made("rigl", model, masks, optimizer, fraction=0.5, decay="constant")
    model[0].weight.grad = torch.full((1, 6), 2.0)
    held.project()
    optimizer.step()
    # Drops places 0 and 1; the largest gradients among 0, 1, 4, 5 are those of 1 and 5.
    model[0].weight.grad = torch.tensor([[1.0, 5.0, 9.0, 9.0, 2.0, -6.0]])
    built.update(10)
    assert held.masks["0.weight"].tolist() == [[False, True, True, True, False, True]]
    expected = torch.tensor([[0.0, 0.2, 3.0, 4.0, 0.0, 0.0]])
    assert torch.equal(model[0].weight.detach(), expected)
    momentum = optimizer.state[model[0].weight]["momentum_buffer"]
    assert momentum.tolist() == [[0.0, 2.0, 2.0, 2.0, 0.0, 0.0]]
    assert built.epoch_end(0) == {"density": 4 / 6, "mask_updates": 1, "regrown": 1}


def test_where_few_places_are_free_dropped_weights_fill_the_rest() -> None:
    model = nn.Sequential(nn.Linear(10, 1, bias=False))
    mask = torch.ones(1, 10, dtype=torch.bool)
    mask[0, 3] = False
    for method in ("rigl", "set"):
        built, held, _ = made(method, model, Masks({"0.weight": mask}), fraction=0.9, decay="constant")
        fake_gradients(model, 0)
        built.update(10)
        assert held.masks.kept == 9
        held.detach()


def test_gradients_that_are_not_finite() -> None:
    model = nn.Sequential(nn.Linear(8, 1, bias=False))
    mask = torch.tensor([[True, True, True, True, False, False, False, False]])
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0, 0, 0, 0, 0]]))
    built, held, _ = made("rigl", model, Masks({"0.weight": mask}), fraction=0.5, decay="constant")
    nan, inf = math.nan, math.inf
    model[0].weight.grad = torch.tensor([[nan, nan, 0.0, 0.0, nan, -inf, 1e-9, nan]])
    built.update(10)
    assert held.masks["0.weight"].tolist() == [[False, False, True, True, False, True, True, False]]


@pytest.mark.parametrize("method", ["rigl", "set"])
def test_ties_and_random_growth_follow_seed_level_and_step(method: str) -> None:
    def grown(seed: int, level: int, step: int) -> Masks:
        model = network()
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(1.0)
        built, held, _ = made(method, model, random_masks(model), seed=seed, level=level, decay="constant")
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        torch.rand(seed + step)  # the global generator must play no part
        built.update(step)
        return held.masks

    assert grown(0, 0, 10) == grown(0, 0, 10)
    others = [grown(1, 0, 10), grown(0, 1, 10), grown(0, 0, 20)]
    assert len({masks.digest for masks in [grown(0, 0, 10), *others]}) == 4


def test_random_growth_is_even_over_all_free_places() -> None:
    model = nn.Sequential(nn.Linear(20, 1, bias=False))
    mask = torch.zeros(1, 20, dtype=torch.bool)
    mask[0, :10] = True
    with torch.no_grad():
        model[0].weight.copy_(torch.arange(1.0, 21.0).view(1, 20))
    hits = torch.zeros(20)
    rounds = 600
    for seed in range(rounds):
        with torch.no_grad():
            model[0].weight.copy_(torch.arange(1.0, 21.0).view(1, 20))
        built, held, _ = made("set", model, Masks({"0.weight": mask}), seed=seed, fraction=0.5, decay="constant")
        built.update(10)
        hits += held.masks["0.weight"][0]
        held.detach()
    assert (hits[5:10] == rounds).all()
    free = torch.cat([hits[:5], hits[10:]]) / rounds  # 5 of 15 places
    assert float((free - 1 / 3).abs().max()) < 5 * math.sqrt(1 / 3 * 2 / 3 / rounds)


# Gradual pruning ----------------------------------------------------------------------------------------------------


def by_magnitude(model: nn.Module, asked: list[float]):
    """Keeps the largest weights of the whole network, by one sort."""

    def prune(density: float, masks: Masks) -> Masks:
        assert torch.is_grad_enabled(), "criteria differentiate"
        asked.append(density)
        keep = math.floor(density * masks.total + 0.5)
        named = prunable_parameters(model)
        flat = torch.cat([named[n].detach().abs().masked_fill(~masks[n], -1.0).flatten() for n in masks])
        order = flat.argsort(descending=True)[:keep]
        chosen = torch.zeros(len(flat), dtype=torch.bool)
        chosen[order] = True
        parts = chosen.split([masks[n].numel() for n in masks])
        return Masks({n: part.view(masks[n].shape) for n, part in zip(masks, parts, strict=True)})

    return prune


def test_gradual_pruning_follows_the_cubic_and_ends_exactly() -> None:
    model, asked = network(), []
    first = Masks.dense(model)
    built, held, _ = made("gmp", model, first, total=100, until=0.5, density=0.1, prune=by_magnitude(model, asked))
    seen = [first]
    for step in (10, 20, 30, 40):
        built.update(step)
        assert held.masks <= seen[-1]
        seen.append(held.masks)
    # t0 = 0, t1 = 40, sparsity 0.9 (1 - (1 - t/40)^3): 0.5203125, 0.7875, 0.8859375, 0.9
    assert asked == pytest.approx([0.4796875, 0.2125, 0.1140625, 0.1])
    assert asked[-1] == 0.1
    expected = [math.floor(d * first.total + 0.5) for d in (1.0, 0.4796875, 0.2125, 0.1140625, 0.1)]
    assert [m.kept for m in seen] == expected
    assert built.epoch_end(0) == {"density": held.masks.density, "mask_updates": 4, "regrown": 0}


def test_gradual_pruning_starts_at_its_start_and_density() -> None:
    model, asked = network(), []
    first = by_magnitude(model, [])(0.5, Masks.dense(model))
    options = {"start": Step(2), "until": 0.55, "initial_density": 0.5}
    built, held, _ = made("gmp", model, first, density=0.2, prune=by_magnitude(model, asked), **options)
    built.update(20)  # s = s_i there: nothing to prune
    assert held.masks == first
    assert asked == []
    for step in (30, 40, 50):
        built.update(step)
    # 0.2 + 0.3 (1 - (t - 20)/30)^3
    assert asked == pytest.approx([0.2 + 0.3 * 8 / 27, 0.2 + 0.3 / 27, 0.2])


def test_a_single_update_prunes_all_at_once() -> None:
    model, asked = network(), []
    options = {"start": Step(1), "every": 100, "prune": by_magnitude(model, asked)}
    built, held, _ = made("gmp", model, Masks.dense(model), density=0.25, **options)
    built.update(10)
    assert asked == [0.25]
    assert held.masks.kept == math.floor(0.25 * held.masks.total + 0.5)


def test_gradual_pruning_refuses_what_cannot_be() -> None:
    model = network()
    sparse = by_magnitude(model, [])(0.05, Masks.dense(model))
    with pytest.raises(UserError, match=r"pruning\.density=0\.1 is above the density of the first masks"):
        made("gmp", model, sparse, density=0.1, prune=by_magnitude(model, []))
    with pytest.raises(UserError, match=r"pruning\.density=0\.5 is above dynamic\.initial_density, 0\.4"):
        made("gmp", model, Masks.dense(model), density=0.5, initial_density=0.4, prune=by_magnitude(model, []))
    with pytest.raises(UserError, match=r"needs pruning\.density"):
        made("gmp", model, Masks.dense(model), prune=by_magnitude(model, []))


def test_a_pruning_that_brings_weights_back_is_stopped() -> None:
    model = network()
    half = by_magnitude(model, [])(0.5, Masks.dense(model))
    other = Masks({name: ~mask for name, mask in half.items()})
    built, held, _ = made("gmp", model, half, density=0.1, prune=lambda density, masks: other)
    with pytest.raises(RuntimeError, match="step 70 brought weights back"):
        built.update(70)
    assert held.masks == half


def test_counts_of_an_epoch_survive_a_restart() -> None:
    model = network()
    built, _, _ = made("set", model, random_masks(model))
    built.update(10)
    other, _, _ = made("set", network(), random_masks(model))
    other.load_state(built.state())
    first, second = built.epoch_end(0), other.epoch_end(0)
    assert {**first, "density": 0} == {**second, "density": 0}
    assert first["mask_updates"] == 1
    assert built.epoch_end(1)["mask_updates"] == 0
    with pytest.raises(UserError, match=r"another dynamic\.method"):
        other.load_state({"updates": torch.tensor(1)})
