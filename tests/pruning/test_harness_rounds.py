"""The pruning harness over several rounds: schedules, exact densities, nesting, regrowth, notes."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from utils.masks import Masks
from utils.params.pruning import Pruning
from utils.pruning.criteria import criterion
from utils.pruning.harness import Pruned, PruningHarness, Round
from utils.system.errors import UserError
from utils.system.registry import Entry

SHAPE = (2, 6, 6)
NOTE = r"^all scores of pruning\.criterion={} were equal{}: not they but the order of ties"


def net(seed: int = 0) -> nn.Sequential:
    """1,090 prunable weights."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(8, 10, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 29, bias=False),
    )  # fmt: skip


def images(count: int = 3, seed: int = 5) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(4, *SHAPE, generator=generator), torch.randint(0, 29, (4,), generator=generator))
        for _ in range(count)
    ]


def prune(model: nn.Module, density: float, masks: Masks | None = None, **section: Any) -> Pruned:
    harness = PruningHarness(Pruning(**section), seed=4, input_shape=SHAPE)
    return harness.prune(model, masks, density, images())


def add(monkeypatch: pytest.MonkeyPatch, function: Any, **traits: Any) -> None:
    """Register the criterion `mine` for one test."""
    criterion.load()
    traits = {"batchnorm": "none", "reads": "nothing", **traits}
    monkeypatch.setitem(criterion._entries, "mine", Entry("mine", function, traits))


def recorded(monkeypatch: pytest.MonkeyPatch, **traits: Any) -> list[Masks]:
    """Register `mine`, |w| of the live weights and 0 elsewhere; returns the masks it is asked to score."""
    seen: list[Masks] = []

    def mine(model: nn.Module, masks: Masks, *_: Any, **__: Any) -> dict[str, Tensor]:
        seen.append(masks)
        return {n: p.detach().abs() * masks[n] for n, p in model.named_parameters() if n in masks}

    add(monkeypatch, mine, **traits)
    return seen


def reached(masks: Masks, density: float) -> float:
    return math.floor(density * masks.total + 0.5) / masks.total


def test_synflow_takes_a_hundred_exponential_rounds() -> None:
    model = net()
    pruned = prune(model, 0.1, criterion="synflow")
    total = pruned.masks.total
    assert pruned.masks.kept == math.floor(0.1 * total + 0.5)
    assert [r.requested for r in pruned.rounds] == pytest.approx([0.1 ** (i / 100) for i in range(1, 101)])
    assert [r.reached for r in pruned.rounds] == [reached(pruned.masks, r.requested) for r in pruned.rounds]
    assert pruned.rounds[-1] == Round(0.1, pruned.masks.density)
    assert pruned.notes == ()


def test_rounds_that_come_to_the_same_count_are_one() -> None:
    """From 0.1 of 1,122 weights a hundred rounds to 0.09 are eleven or so steps of one weight."""
    pruned = prune(net(), 0.09, prune(net(), 0.1, criterion="magnitude").masks, criterion="synflow")
    kept = [round(r.reached * pruned.masks.total) for r in pruned.rounds]
    assert kept == list(range(kept[0], kept[-1] - 1, -1))
    assert pruned.rounds[-1] == Round(0.09, pruned.masks.density)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (None, [0.2 ** (1 / 4), 0.2 ** (2 / 4), 0.2 ** (3 / 4), 0.2]),
        ("exponential", [0.2 ** (1 / 4), 0.2 ** (2 / 4), 0.2 ** (3 / 4), 0.2]),
        ("linear", [0.8, 0.6, 0.4, 0.2]),
        ("snipit", [0.5, 0.35, 0.275, 0.2]),
    ],
)
def test_rounds_see_the_masks_of_the_round_before(
    monkeypatch: pytest.MonkeyPatch, schedule: str | None, expected: list[float]
) -> None:
    seen = recorded(monkeypatch)
    pruned = prune(net(), 0.2, criterion="mine", rounds=4, round_schedule=schedule)
    assert [r.requested for r in pruned.rounds] == pytest.approx(expected)
    assert [r.reached for r in pruned.rounds] == [reached(pruned.masks, d) for d in expected]
    assert [masks.density for masks in (*seen[1:], pruned.masks)] == [r.reached for r in pruned.rounds]
    assert seen[0].density == 1.0
    for before, after in zip(seen, (*seen[1:], pruned.masks), strict=True):
        assert after <= before
        assert after != before


def test_rounds_begin_at_the_density_of_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = recorded(monkeypatch, rounds=2, schedule="linear")
    half = prune(net(), 0.5, criterion="magnitude").masks
    pruned = prune(net(), 0.1, half, criterion="mine")
    assert seen[0] is half
    assert [r.requested for r in pruned.rounds] == pytest.approx([0.3, 0.1], abs=1e-3)
    assert pruned.masks <= seen[1] <= half


def test_nothing_is_scored_where_nothing_is_pruned(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = recorded(monkeypatch)
    half = prune(net(), 0.5, criterion="magnitude").masks
    pruned = prune(net(), 0.5, half, criterion="mine", rounds=7, regrow=True)
    assert pruned.masks is half
    assert pruned.rounds == (Round(0.5, half.density),)
    assert not seen


def test_rounds_of_a_gradient_criterion_score_the_pruned_network() -> None:
    """SNIP in three rounds, by hand: autograd on a copy whose pruned weights are 0."""
    model = net()
    pruned = prune(model, 0.1, criterion="snip", rounds=3, round_schedule="linear")
    kept = {n: torch.ones_like(p, dtype=torch.bool) for n, p in model.named_parameters() if p.ndim > 1}
    total = sum(mask.numel() for mask in kept.values())
    for goal in (0.7, 0.4, 0.1):
        copy = net().double().train()
        weights = {n: p for n, p in copy.named_parameters() if n in kept}
        for name, weight in weights.items():
            weight.data[~kept[name]] = 0.0
        loss = sum(nn.functional.cross_entropy(copy(x.double()), y, reduction="sum") for x, y in images())
        grads = torch.autograd.grad(loss, list(weights.values()))
        scores = {n: (w * g).abs() for (n, w), g in zip(weights.items(), grads, strict=True)}
        flat = torch.cat([scores[n][kept[n]] for n in kept])
        threshold = flat.sort(descending=True).values[math.floor(goal * total + 0.5) - 1]
        kept = {n: kept[n] & (scores[n] >= threshold) for n in kept}
    assert sum(int(mask.sum()) for mask in kept.values()) == pruned.masks.kept
    differing = sum(int((pruned.masks[n] ^ kept[n]).sum()) for n in kept)
    assert differing <= 2  # float32 against float64 at the threshold


def seesaw(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register `mine`: ten weights valued 9..0, and as soon as one is pruned, 0..9."""

    def mine(model: nn.Module, masks: Masks, *_: Any, **__: Any) -> dict[str, Tensor]:
        rising = torch.arange(10.0).reshape(1, 10)
        return {"weight": 9.0 - rising if masks.kept == masks.total else rising}

    add(monkeypatch, mine)


def test_regrowth_brings_weights_back_and_nesting_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    seesaw(monkeypatch)
    model, section = nn.Linear(10, 1), {"criterion": "mine", "rounds": 2, "round_schedule": "linear"}
    nested = prune(model, 0.2, **section).masks["weight"]
    assert nested.flatten().nonzero().flatten().tolist() == [4, 5]  # of 0..5 that round one left
    regrown = prune(model, 0.2, **section, regrow=True)
    assert regrown.masks["weight"].flatten().nonzero().flatten().tolist() == [8, 9]
    assert [r.reached for r in regrown.rounds] == [0.6, 0.2]


def test_regrowth_stays_within_the_masks_of_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    seesaw(monkeypatch)
    start = Masks({"weight": torch.tensor([[1, 1, 1, 1, 1, 1, 1, 1, 0, 0]]).bool()})
    found = prune(nn.Linear(10, 1), 0.2, start, criterion="mine", rounds=2, round_schedule="linear", regrow=True)
    assert found.masks["weight"].flatten().nonzero().flatten().tolist() == [6, 7]


def test_force_on_snip_brings_weights_back() -> None:
    """The weights that iterative SNIP and FORCE keep differ, and some that FORCE keeps had been pruned."""
    section: dict[str, Any] = {"criterion": "snip", "rounds": 6, "regrow": True}
    model, harness = net(), PruningHarness(Pruning(**section), seed=4)
    start = harness.start(model)
    masks, back = start, 0
    for goal in harness.densities(1.0, 0.1):
        after = harness.select(harness.score(model, masks, images()), start, goal)
        back += sum(int((after[n] & ~masks[n]).sum()) for n in masks)
        masks = after
    assert back > 0
    forced = prune(model, 0.1, **section)
    assert forced.masks == masks
    assert forced.masks != prune(model, 0.1, criterion="snip", rounds=6).masks
    assert [r.reached for r in forced.rounds] == [reached(masks, r.requested) for r in forced.rounds]


def test_densities_on_the_way_that_fixed_layers_forbid_are_skipped() -> None:
    """Half of all weights lie in the layer fixed at 0.05: no density above 0.525 can be reached."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 20, bias=False), nn.Linear(20, 20, bias=False))
    pruned = prune(
        model, 0.1, rounds=9, round_schedule="linear", layer_densities=("0.weight=0.05",), criterion="magnitude"
    )
    assert [r.requested for r in pruned.rounds] == pytest.approx([0.5, 0.4, 0.3, 0.2, 0.1])
    assert pruned.masks.counts == {"0.weight": 20, "1.weight": 60}
    with pytest.raises(UserError, match=r"largest feasible density is 0\.525"):
        prune(model, 0.6, rounds=9, layer_densities=("0.weight=0.05",), criterion="magnitude")


@pytest.mark.parametrize("pattern", ["kernel", "block=1x2", "channel"])
def test_whole_groups_in_rounds_never_exceed_the_request(pattern: str) -> None:
    pruned = prune(net(), 0.3, criterion="magnitude", rounds=5, pattern=pattern)
    assert all(r.reached <= reached(pruned.masks, r.requested) for r in pruned.rounds)
    assert pruned.rounds[-1] == Round(0.3, pruned.masks.density)
    largest = max(mask.numel() for mask in pruned.masks.values())
    assert pruned.masks.kept > 0.3 * pruned.masks.total - largest


def zero_head() -> nn.Sequential:
    model = net()
    nn.init.zeros_(model[-1].weight)  # type: ignore[arg-type]
    return model


@pytest.mark.parametrize("name", ["snip", "taylor", "fisher", "synflow"])
def test_scores_that_decide_nothing_are_told_once(name: str) -> None:
    """A head of zeros passes no gradient back, and its own gradient meets weights of 0."""
    pruned = prune(zero_head(), 0.2, criterion=name)
    where = " in 100 of 100 rounds" if name == "synflow" else ""
    assert pruned.masks.kept == math.floor(0.2 * pruned.masks.total + 0.5)
    (note,) = pruned.notes
    assert re.match(NOTE.format(name, where), note)
    assert "\n" not in note


@pytest.mark.parametrize("name", ["crop", "grasp", "prospr"])
def test_second_derivatives_see_past_a_head_of_zeros(name: str) -> None:
    """They ask how the gradient of the head, which is not 0, depends on the weights before it."""
    assert prune(zero_head(), 0.2, criterion=name).notes == ()


@pytest.mark.parametrize("name", criterion.names())
def test_no_note_where_scores_differ(name: str) -> None:
    assert prune(net(), 0.2, criterion=name).notes == ()


@pytest.mark.parametrize("name", ["random", "magnitude"])
def test_no_note_for_a_head_of_zeros_that_the_others_outrank(name: str) -> None:
    assert prune(zero_head(), 0.2, criterion=name).notes == ()
    assert prune(zero_head(), 0.2, criterion=name, allocation="uniform", normalize="none").notes == ()


def test_the_note_counts_the_rounds_it_is_about(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal live scores count, whatever pruned places score; one layer alone with equal scores does not."""

    def mine(model: nn.Module, masks: Masks, *_: Any, **__: Any) -> dict[str, Tensor]:
        if masks.density < 0.5:
            return {"0.weight": torch.ones(4, 4), "1.weight": torch.arange(16.0).reshape(4, 4)}
        return {n: torch.where(mask, -2.0, torch.rand(4, 4)) for n, mask in masks.items()}

    add(monkeypatch, mine)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    notes = prune(model, 0.2, criterion="mine", rounds=4, round_schedule="linear").notes
    assert len(notes) == 1
    assert "criterion=mine were equal in 3 of 4 rounds:" in notes[0]


def test_infinite_and_signed_zero_scores_can_be_equal_too(monkeypatch: pytest.MonkeyPatch) -> None:
    for values, told in (([math.inf] * 4, 1), ([0.0, -0.0, 0.0, -0.0], 1), ([math.inf, -math.inf, 0.0, 0.0], 0)):
        add(monkeypatch, lambda *_, values=values, **__: {"weight": torch.tensor([values])})
        assert len(prune(nn.Linear(4, 1), 0.5, criterion="mine").notes) == told


def test_one_live_weight_is_no_tie() -> None:
    model = nn.Linear(1, 1)
    assert prune(model, 0.0, criterion="magnitude").notes == ()


def test_masks_of_equal_scores_follow_the_seed() -> None:
    def masks(seed: int) -> Masks:
        section = Pruning(criterion="synflow")
        return PruningHarness(section, seed=seed, input_shape=SHAPE).prune(zero_head(), None, 0.2).masks

    assert masks(1) == masks(1)
    assert masks(1) != masks(2)


def test_one_scoring_of_equal_scores_is_told_too() -> None:
    model = zero_head()
    harness = PruningHarness(Pruning(criterion="snip"), seed=4)
    start = harness.start(model)
    scores = harness.score(model, start, images())
    picked = harness.pick(scores, start, 0.3)
    assert picked == harness.prune(model, start, 0.3, images())
    assert len(picked.notes) == 1
    assert harness.pick(scores, start, 1.0) == Pruned(start, (Round(1.0, 1.0),))
