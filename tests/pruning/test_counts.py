"""Impossible requests are found from counts alone, exactly where pruning itself would find them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from utils.masks import Masks
from utils.params.pruning import Pruning
from utils.pruning import prune
from utils.pruning.choose import choose, plan
from utils.pruning.counts import Counts, FixedLayer
from utils.pruning.criteria import criterion
from utils.pruning.harness import PruningHarness
from utils.system.errors import UserError
from utils.system.registry import Entry

SHAPES = [(7, 3), (2, 4), (5, 5)]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in SHAPES))


def harness(*entries: str, **options: Any) -> PruningHarness:
    return PruningHarness(Pruning(layer_densities=entries, **options), seed=0)


def refusal(pruner: PruningHarness, masks: Masks, densities: Sequence[float], iterative: bool) -> str | None:
    """What really pruning says: the message of the first refusal, None when all goes well."""
    model, live = net(), masks
    for density in densities:
        try:
            found = pruner.prune(model, live, density).masks
        except UserError as error:
            return str(error)
        live = found if iterative else masks
    return None


def said(pruner: PruningHarness, masks: Masks, densities: Sequence[float], iterative: bool) -> str | None:
    try:
        pruner.check(masks, densities, iterative)
    except UserError as error:
        return str(error)
    return None


SHARES = st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1))


@given(
    kind=st.sampled_from(["global", "uniform", "erk", "er", "balanced"]),
    name=st.sampled_from(["magnitude", "random"]),
    fixed=st.lists(st.tuples(st.sampled_from(["0.*", "1.weight", "[12].*", "*", "x*"]), SHARES), max_size=2),
    densities=st.lists(SHARES, max_size=5),
    falling=st.booleans(),
    before=st.none() | st.tuples(SHARES, SHARES),
    iterative=st.booleans(),
)
@settings(max_examples=400, deadline=None)
def test_check_says_what_pruning_says(
    kind: str,
    name: str,
    fixed: list[tuple[str, float]],
    densities: list[float],
    falling: bool,
    before: tuple[float, float] | None,
    iterative: bool,
) -> None:
    pruner = harness(*(f"{glob}={share!r}" for glob, share in fixed), criterion=name, allocation=kind)
    densities = sorted(densities, reverse=True) if falling else densities
    masks = Masks.dense(net())
    if before is not None:
        generator = torch.Generator().manual_seed(1)
        masks = Masks({
            key: torch.rand(mask.shape, generator=generator) < before[position % 2]
            for position, (key, mask) in enumerate(masks.items())
        })  # fmt: skip
    # Entries that fix nothing are refused without any density, too.
    wanted = refusal(pruner, masks, densities or [masks.density], iterative)
    if densities or (wanted is not None and "matches no" in wanted):
        assert said(pruner, masks, densities, iterative) == wanted


def test_the_dense_level_hides_nothing_of_later_ones() -> None:
    masks = Masks.dense(net())
    pruner = harness("0.*=1")
    pruner.check(masks, [1.0, 0.6], iterative=True)
    smallest = masks["0.weight"].numel() / masks.total
    with pytest.raises(
        UserError, match=r"fixed layers alone keep 21 weights, more than the 11 of density 0\.2;"
    ) as caught:
        pruner.check(masks, [1.0, 0.6, 0.2], iterative=True)
    assert float(str(caught.value).rpartition(" ")[2]) == smallest
    pruner.check(masks, [1.0, 0.6, smallest], iterative=True)


def test_counts_carry_over_levels_and_not_over_single_shots() -> None:
    masks = Masks.dense(net())
    with pytest.raises(UserError, match=r"density 0\.5 asks for 27 weights but only 11 of 54 survive"):
        harness().check(masks, [0.2, 0.5], iterative=True)
    harness().check(masks, [0.2, 0.5], iterative=False)


def test_too_little_room_is_found_beforehand() -> None:
    masks = Masks.dense(net())
    with pytest.raises(UserError, match=r"other layers have 33 live weights for the 49 .* largest feasible density is"):
        harness("0.*=0").check(masks, [0.9], iterative=True)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["layer1.*=0.5"], "matches no prunable parameter"),
        (["*=0.5", "0.*=1"], "'0.*' is never used"),
    ],
)
@pytest.mark.parametrize("densities", [[], [1.0], [0.5]])
def test_entries_that_fix_nothing_are_found_beforehand(
    entries: list[str], message: str, densities: list[float]
) -> None:
    with pytest.raises(UserError, match=message.replace("*", r"\*")):
        harness(*entries).check(Masks.dense(net()), densities, iterative=True)


@pytest.mark.parametrize("density", [-0.1, 1.5, math.nan])
def test_densities_out_of_range_are_found_beforehand(density: float) -> None:
    with pytest.raises(UserError, match=r"pruning\.density=.* is not between 0 and 1"):
        harness().check(Masks.dense(net()), [density], iterative=False)


def test_a_model_without_prunable_parameters_can_only_stay_dense() -> None:
    nothing = Masks({})
    with pytest.raises(UserError, match=r"no prunable parameter left; check pruning\.exclude"):
        harness().check(nothing, [0.5], iterative=True)
    harness().check(nothing, [], iterative=True)


def test_nothing_is_scored_for_an_impossible_request(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("scored")

    criterion.load()
    monkeypatch.setitem(criterion._entries, "mine", Entry("mine", never, {"batchnorm": "none", "reads": "nothing"}))
    harness(criterion="mine").check(Masks.dense(net()), [0.5, 0.1], iterative=True)
    with pytest.raises(UserError, match="smallest feasible density is"):
        prune(net(), density=0.01, criterion="mine", layer_densities=["0.*=1"])


@pytest.mark.parametrize(("reads", "expected"), [("nothing", False), ("train", True)])
def test_a_harness_says_whether_it_reads_data(monkeypatch: pytest.MonkeyPatch, reads: str, expected: bool) -> None:
    criterion.load()
    entry = Entry("mine", criterion["random"], {"batchnorm": "none", "reads": reads})
    monkeypatch.setitem(criterion._entries, "mine", entry)
    assert harness(criterion="mine").reads_data is expected


@pytest.mark.parametrize("options", [{"min_kept": 4}, {"first_layer": "dense"}, {"last_layer": "dense", "min_kept": 1}])
@pytest.mark.parametrize("kind", ["global", "uniform", "erk", "balanced"])
def test_floors_and_dense_layers_are_known_beforehand(options: dict[str, Any], kind: str) -> None:
    pruner = harness(allocation=kind, **options)
    for densities in itertools.product([1.0, 0.9, 0.6], [0.6, 0.45, 0.39], [0.3, 0.2, 0.15, 0.0]):
        masks = Masks.dense(net())
        assert said(pruner, masks, densities, True) == refusal(pruner, masks, densities, True)


def test_dense_layers_stay_as_they_are_over_levels() -> None:
    masks = Masks({name: mask & (torch.arange(mask.numel()).reshape(mask.shape) % 4 > 0)
                   for name, mask in Masks.dense(net()).items()})  # fmt: skip
    pruner = harness(first_layer="dense")
    alive = masks.counts["0.weight"]
    pruner.check(masks, [0.6, 0.5, alive / masks.total], iterative=True)
    for density in (0.6, 0.5, alive / masks.total):
        masks = pruner.prune(net(), masks, density).masks
        assert masks.counts["0.weight"] == alive
    assert masks.kept == alive


def test_groups_are_forgiven_what_they_could_not_reach() -> None:
    masks = Masks({"a": torch.ones(4, 3, dtype=torch.bool), "b": torch.ones(4, 7, dtype=torch.bool)})
    section = Pruning(pattern="channel", layer_densities=("b=0.5",))
    scores = {name: torch.rand(mask.shape) for name, mask in masks.items()}
    for density in (0.6, 0.59, 0.58, 0.5):
        counts = plan(section, masks)
        masks = choose(scores, masks, density, section, 0)
        assert (counts.pruned(density) is counts) == (density in (0.59, 0.58))
    with pytest.raises(UserError, match="largest feasible density is"):
        plan(section, masks).pruned(0.9)
    counts = plan(Pruning(pattern="channel"), masks)
    assert counts.pruned((masks.kept + 6) / masks.total) is counts
    with pytest.raises(UserError, match="survive; the largest feasible density is"):
        counts.pruned((masks.kept + 7) / masks.total)


def test_slack_is_that_of_masks_and_ends_with_a_pruning() -> None:
    fixed = FixedLayer("a", 0.5, 100, 46, slack=9)
    counts = Counts(200, (fixed,), 45, slack=9)
    assert counts.pruned(0.5) is counts  # 100 asked, 91 live: each part within a group of its goal
    with pytest.raises(UserError, match="only 91 of 200 survive"):
        counts.pruned(0.55)
    wide = Counts(200, (replace(fixed, alive=60),), 45, slack=9).pruned(0.52)  # 54 left for 45 live
    assert (wide.fixed[0].alive, wide.free, wide.slack, wide.fixed[0].slack) == (50, 54, 0, 0)
    with pytest.raises(UserError, match="only 104 of 200 survive"):
        wide.pruned(0.525)
    with pytest.raises(UserError, match=r"other layers have 45 live weights for the 55"):
        Counts(200, (replace(fixed, alive=60),), 45, slack=9).pruned(0.525)
