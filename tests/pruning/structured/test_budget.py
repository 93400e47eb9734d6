"""Budgets: exact counts, exact to one unit under the order, seeded ties, constraints, refusals."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.pruning.structured_cases import SHAPE, channels, half, small
from utils.masks import Masks
from utils.pruning.structured import Channels, Limits, shrink
from utils.pruning.structured.budget import choose_units
from utils.pruning.structured.cost import MaskedCost
from utils.system.errors import UserError


def counted(model: torch.nn.Module, shape: tuple[int, int, int]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, *shape))
    return counter.get_total_flops() // 2


def scores_of(found: Channels, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {group.name: torch.rand(group.size, generator=generator) for group in found.open}


@pytest.mark.parametrize(
    ("name", "side"),
    [("cifar/resnet20", 32), ("timm/efficientnet_b0", 64), ("timm/vit_tiny_patch16_224", 32)],
)
def test_the_formula_counts_what_the_counter_counts(name: str, side: int) -> None:
    model, found = channels(name, side)
    shape = (3, side, side)
    assert found.cost.macs() == counted(model, shape)
    assert found.cost.parameters() == sum(p.numel() for p in model.parameters())
    mask = half(found)
    smaller = shrink(model, found.groups, mask)
    assert found.cost.macs(mask.widths) == counted(smaller, shape) < 0.7 * found.cost.macs()
    assert found.cost.parameters(mask.widths) == sum(p.numel() for p in smaller.parameters())


def test_published_counts_of_macs() -> None:
    """The released code of Pruning from Scratch counts 313.2 M for VGG-16 and 40.8 M for ResNet-20."""
    assert channels("cifar/vgg16_bn", 32)[1].cost.macs() == pytest.approx(313.2e6, rel=2e-3)
    assert channels("cifar/resnet20", 32)[1].cost.macs() == pytest.approx(40.8e6, rel=2e-3)


@pytest.mark.parametrize("budget", ["macs", "parameters", "channels"])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_one_more_unit_would_cost_too_much(budget: str, scope: str) -> None:
    """Against an oracle that adds units one by one in the order of their scores and shrinks the model for each."""
    model = small()
    found = Channels.of(model, SHAPE)
    scores = scores_of(found)
    keep = 0.6
    chosen = found.choose(scores, budget=budget, keep=keep, scope=scope)

    def cost(mask_widths: dict[str, int]) -> int:
        return {
            "macs": found.cost.macs(mask_widths),
            "parameters": found.cost.parameters(mask_widths),
            "channels": sum(mask_widths[group.name] for group in found.open),
        }[budget]

    ranked = []
    for group in found.open:
        order = sorted(range(group.size), key=lambda unit, s=scores[group.name]: -float(s[unit]))
        for place, unit in enumerate(order):
            key = float(scores[group.name][unit]) if scope == "global" else -(place + 0.5) / group.size
            ranked.append((key, group.name, unit))
    ranked.sort(key=lambda entry: -entry[0])
    full = {group.name: group.size for group in found.open}
    allowed = keep * cost(full) + (0.5 if budget == "channels" else 0)
    fits = [
        n
        for n in range(len(ranked) + 1)
        if cost({name: max(1, sum(entry[1] == name for entry in ranked[:n])) for name in full}) <= allowed
    ]
    widths = {name: max(1, sum(entry[1] == name for entry in ranked[: max(fits)])) for name in full}
    assert chosen.reached == cost(widths) <= allowed
    if scope == "global":  # quantiles tie between groups, and a seeded order decides
        assert {name: chosen.mask.widths[name] for name in full} == widths


def test_equal_scores_are_decided_by_the_seed_and_counts_stay_exact() -> None:
    found = Channels.of(small(), SHAPE)
    equal = {group.name: torch.ones(group.size) for group in found.open}
    masks = [found.choose(equal, budget="channels", keep=0.5, seed=seed).mask for seed in (0, 0, 1, 2, 3)]
    total = sum(group.size for group in found.open)
    for mask in masks:
        assert sum(mask.widths[group.name] for group in found.open) == int(0.5 * total + 0.5)
    assert masks[0].digest == masks[1].digest
    assert len({mask.digest for mask in masks}) > 2


def test_the_best_units_of_a_group_stay() -> None:
    found = Channels.of(small(), SHAPE)
    scores = scores_of(found, 3)
    mask = found.choose(scores, budget="macs", keep=0.5).mask
    for group in found.open:
        live, dead = scores[group.name][mask[group.name]], scores[group.name][~mask[group.name]]
        assert not len(dead) or float(live.min()) > float(dead.max())


def test_widths_respect_minimum_and_multiples() -> None:
    found = channels("cifar/resnet20", 32)[1]
    scores = {group.name: torch.rand(group.size) * 10.0**-number for number, group in enumerate(found.open)}
    for limits in (Limits(min_width=5), Limits(round_to=8), Limits(min_width=4, round_to=4)):
        chosen = found.choose(scores, budget="macs", keep=0.5, limits=limits)
        assert chosen.reached <= chosen.allowed
        for group in found.open:
            width = chosen.mask.widths[group.name]
            assert width >= min(limits.min_width, group.size)
            assert width % limits.round_to == 0 or width == group.size


@pytest.mark.parametrize("round_to", [1, 4, 7])
@pytest.mark.parametrize("min_width", [1, 3])
def test_a_width_never_falls_as_more_is_kept(round_to: int, min_width: int) -> None:
    for size in (1, 2, 8, 17):
        widths = [Limits(min_width, round_to).width(kept, size) for kept in range(size + 1)]
        assert widths == sorted(widths)
        assert widths[0] >= min(size, min_width)
        assert widths[-1] <= size


def test_targets_are_hit_within_half_a_percent() -> None:
    for name, side in (("cifar/resnet20", 32), ("cifar/vgg16_bn", 32), ("torchvision/mobilenet_v2", 64)):
        found = channels(name, side)[1]
        for keep in (0.3, 0.5, 0.7):
            chosen = found.choose(scores_of(found), budget="macs", keep=keep)
            assert 0.995 * keep <= chosen.reached / chosen.reference <= keep


def test_what_cannot_be_reached_is_refused_with_the_least_that_can() -> None:
    found = Channels.of(small(), SHAPE)
    with pytest.raises(UserError, match=r"structured.keep=0.05: the narrowest widths allowed cost"):
        found.choose(scores_of(found), budget="macs", keep=0.05)
    nan = {group.name: torch.full((group.size,), float("nan")) for group in found.open}
    with pytest.raises(UserError, match="NaN among the scores of 'a'"):
        found.choose(nan, budget="macs", keep=0.5)


def test_a_share_of_another_model() -> None:
    found = Channels.of(small(), SHAPE)
    chosen = choose_units(found.groups, scores_of(found), found.cost, budget="macs", keep=0.5, reference=10_000)
    assert chosen.reached <= chosen.allowed == 5_000


def test_a_pruned_weight_saves_its_positions() -> None:
    """Counted by hand: conv `a` sees 8x8 positions, `dw` too, `fc1` one."""
    model = small()
    masks = Masks.dense(model)
    cost = MaskedCost.of(model, SHAPE)
    dense = 64 * (162 + 24 + 36 + 24) + 16 * 5 + 5 * 3
    parameters = sum(p.numel() for p in model.parameters())
    assert cost.row(masks) == {"macs_dense": dense, "macs": dense, "parameters": parameters}
    cut = {name: mask.clone() for name, mask in masks.items()}
    cut["a.weight"][0, 0] = False
    cut["fc1.weight"][:, 0] = False
    assert cost.row(Masks(cut)) == {"macs_dense": dense, "macs": dense - 9 * 64 - 5, "parameters": parameters - 14}
