"""The pruning harness as a whole: exact counts, the subset law, seeds, limits, messages."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from utils.masks import Masks
from utils.params.pruning import Pruning
from utils.pruning import prune
from utils.pruning.allocations import allocation
from utils.pruning.criteria import criterion
from utils.pruning.harness import PruningHarness, Round
from utils.pruning.select import Pool
from utils.system.errors import UserError
from utils.system.registry import Entry, declared

KINDS = ["balanced", "er", "erk", "global", "uniform"]
"""All allocations but `from_mask`, which needs a file."""


def net() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Flatten(),
        nn.Linear(8, 10),
        nn.Linear(10, 1),
    )


def with_criterion(monkeypatch: pytest.MonkeyPatch, function: Any, **traits: str) -> None:
    """Add the criterion `mine` for one test."""
    criterion.load()
    traits = {"batchnorm": "eval", "reads": "nothing", **traits}
    monkeypatch.setitem(criterion._entries, "mine", Entry("mine", function, traits))


def test_the_allocations_are_declared() -> None:
    assert list(declared("allocation")) == allocation.names() == sorted([*KINDS, "from_mask"])


class Bag(nn.Module):
    """Linear layers of given shapes that no forward pass connects."""

    def __init__(self, shapes: Iterable[tuple[int, int]]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in shapes)


SCORES = st.sampled_from([0.0, -0.0, 1.0, 1.0, -3.0, 0.25, math.inf, -math.inf])


@st.composite
def cases(draw: st.DrawFn) -> tuple[Bag, Masks, dict[str, Tensor]]:
    """A bag of layers, one-weight layers among them, its live masks and scores with many ties."""
    model = Bag(draw(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=5)))
    masks, scores = {}, {}
    for name, p in model.named_parameters():
        n = p.numel()
        masks[name] = torch.tensor(draw(st.lists(st.booleans(), min_size=n, max_size=n))).reshape(p.shape)
        scores[name] = torch.tensor(draw(st.lists(SCORES, min_size=n, max_size=n))).reshape(p.shape)
    return model, Masks(masks), scores


@pytest.mark.parametrize("kind", KINDS)
@given(case=cases(), share=st.one_of(st.floats(0, 1), st.sampled_from([0.0, 1.0])), seed=st.integers(0, 3))
@settings(max_examples=80, deadline=None)
def test_counts_are_exact_and_only_survivors_stay(kind: str, case: tuple[Any, ...], share: float, seed: int) -> None:
    _, masks, scores = case
    density = share * masks.kept / masks.total
    harness = PruningHarness(Pruning(allocation=kind), seed=seed)
    found = harness.select(scores, masks, density)
    assert found.kept == math.floor(density * masks.total + 0.5)
    assert found <= masks
    assert found.digest == PruningHarness(Pruning(allocation=kind), seed=seed).select(scores, masks, density).digest


@given(case=cases(), share=st.floats(0, 1))
@settings(max_examples=80, deadline=None)
def test_global_keeps_what_a_full_sort_keeps(case: tuple[Any, ...], share: float) -> None:
    _, masks, scores = case
    found = PruningHarness(Pruning(), seed=0).select(scores, masks, share * masks.density)
    live = sorted((s for name in masks for s in scores[name][masks[name]].tolist()), reverse=True)
    kept = sorted((s for name in masks for s in scores[name][found[name]].tolist()), reverse=True)
    assert kept == live[: len(kept)]


@given(case=cases(), share=st.floats(0, 1), fixed=st.floats(0, 1))
@settings(max_examples=80, deadline=None)
def test_fixed_layers_and_totals_are_exact_or_refused(case: tuple[Any, ...], share: float, fixed: float) -> None:
    model, _, scores = case
    masks = Masks.dense(model)
    first = next(iter(masks))
    pinned = math.floor(fixed * masks[first].numel() + 0.5)
    keep = math.floor(share * masks.total + 0.5)
    harness = PruningHarness(Pruning(allocation="erk", layer_densities=(f"{first}={fixed!r}",)), seed=0)
    if keep < masks.total and not pinned <= keep <= pinned + masks.total - masks[first].numel():
        with pytest.raises(UserError, match=r"pruning\.layer_densities: .* feasible density is"):
            harness.select(scores, masks, share)
        return
    found = harness.select(scores, masks, share)
    assert found.kept == keep
    assert keep == masks.total or found.counts[first] == pinned


@pytest.mark.parametrize("name", ["magnitude", "random"])
@pytest.mark.parametrize("kind", KINDS)
def test_levels_are_nested_and_exact(name: str, kind: str) -> None:
    model = net()
    harness = PruningHarness(Pruning(criterion=name, allocation=kind), seed=1)
    masks = Masks.dense(model)
    for level in range(12):
        density = 0.7**level
        pruned = harness.prune(model, masks, density)
        assert pruned.masks <= masks
        assert pruned.masks.kept == math.floor(density * masks.total + 0.5)
        assert pruned.rounds == (Round(density, pruned.masks.kept / masks.total),)
        masks = pruned.masks


def test_density_one_returns_full_masks_and_zero_keeps_nothing() -> None:
    model = net()
    full = Masks.dense(model)
    harness = PruningHarness(Pruning(layer_densities=("0.*=0.5",)), seed=0)
    assert harness.prune(model, full, 1.0).masks is full
    assert prune(model, density=0.0).kept == 0


def test_magnitude_keeps_the_largest_weights() -> None:
    model = net()
    masks = prune(model, density=0.3)
    parameters = dict(model.named_parameters())
    kept = torch.cat([parameters[n].detach().abs()[m] for n, m in masks.items()])
    dropped = torch.cat([parameters[n].detach().abs()[~m] for n, m in masks.items()])
    assert kept.min() > dropped.max()


def test_random_masks_follow_the_seed() -> None:
    model = net()
    first, again, other = (prune(model, density=0.3, criterion="random", seed=s) for s in (5, 5, 6))
    assert first == again
    assert first != other


def test_random_in_steps_is_random_at_once() -> None:
    model = net()
    options: dict[str, Any] = {"criterion": "random", "allocation": "uniform", "seed": 2}
    halfway = prune(model, density=0.5, **options)
    assert prune(model, density=0.1, masks=halfway, **options) == prune(model, density=0.1, **options)


def test_excluded_layers_are_outside_masks_and_total() -> None:
    model = net()
    masks = prune(model, density=0.5, exclude=["4.*", "0.weight"])
    assert list(masks) == ["2.weight", "5.weight"]
    assert masks.kept == math.floor(0.5 * (8 * 9 + 10) + 0.5)


def test_layer_densities_fix_layers_and_leave_the_total_exact() -> None:
    model = net()
    masks = prune(model, density=0.4, allocation="uniform", layer_densities=["5.weight=1", "0.*=0.25"])
    assert masks.counts["5.weight"] == 10
    assert masks.counts["0.weight"] == 54
    assert masks.kept == math.floor(0.4 * masks.total + 0.5)
    assert masks.counts["2.weight"] + masks.counts["4.weight"] == masks.kept - 64


def test_fixed_layers_hold_over_levels_and_a_repeated_level_changes_nothing() -> None:
    model = net()
    options: dict[str, Any] = {"layer_densities": ["5.weight=1", "4.weight=0.5"]}
    first = prune(model, density=0.6, **options)
    second = prune(model, density=0.3, masks=first, **options)
    assert second.counts["4.weight"] == 40
    assert second.counts["5.weight"] == 10
    assert second <= first
    assert prune(model, density=0.3, masks=second, **options) is second


@pytest.mark.parametrize("density", [-0.1, 1.5, math.nan])
def test_impossible_densities_are_refused(density: float) -> None:
    with pytest.raises(UserError, match=r"pruning\.density=.* is not between 0 and 1"):
        prune(net(), density=density)


def test_more_than_survives_is_refused_with_the_largest_feasible_density() -> None:
    model = net()
    masks = prune(model, density=0.25)
    with pytest.raises(UserError, match=r"but only \d+ of 378 survive; the largest feasible density is") as caught:
        prune(model, density=0.5, masks=masks)
    named = float(str(caught.value).rpartition(" ")[2])
    assert prune(model, density=named, masks=masks) is masks


def test_fixed_layers_that_take_too_much_name_the_smallest_density() -> None:
    with pytest.raises(UserError, match="smallest feasible density is") as caught:
        prune(net(), density=0.1, layer_densities=["0.*=1"])
    named = float(str(caught.value).rpartition(" ")[2])
    masks = prune(net(), density=named, layer_densities=["0.*=1"])
    assert masks.kept == masks.counts["0.weight"] == 216


def test_fixed_layers_that_take_too_little_name_the_largest_density() -> None:
    with pytest.raises(UserError, match="largest feasible density is") as caught:
        prune(net(), density=0.9, layer_densities=["0.*=0"])
    named = float(str(caught.value).rpartition(" ")[2])
    masks = prune(net(), density=named, layer_densities=["0.*=0"])
    assert masks.kept == masks.total - 216


def test_a_fixed_layer_that_lost_too_many_weights_is_named() -> None:
    masks = prune(net(), density=0.5, layer_densities=["4.weight=0.25"])
    with pytest.raises(UserError, match=r"'4.weight' is fixed at 0.5 but only 20 of its 80 .* density is 0.25"):
        prune(net(), density=0.4, masks=masks, layer_densities=["4.weight=0.5"])
    with pytest.raises(UserError, match=r"'4.weight' is fixed at 0.5"):
        prune(net(), density=0.5, masks=masks, layer_densities=["4.weight=0.5"])


def test_nan_weights_stop_the_run_by_name() -> None:
    model = net()
    with torch.no_grad():
        model[4].weight[2, 3] = math.nan
    with pytest.raises(UserError, match=r"pruning\.criterion=magnitude: NaN among the scores of '4.weight'"):
        prune(model, density=0.5)


def test_infinite_weights_are_kept_first() -> None:
    model = net()
    with torch.no_grad():
        model[4].weight[2, 3] = -math.inf
    masks = prune(model, density=1 / 400)
    assert masks.kept == 1
    assert bool(masks["4.weight"][2, 3])


def test_unknown_names_are_refused_with_a_hint() -> None:
    with pytest.raises(UserError, match="unknown criterion 'magnitud'; did you mean 'magnitude'"):
        prune(net(), density=0.5, criterion="magnitud")
    with pytest.raises(UserError, match="unknown allocation 'erkk'; did you mean 'erk'"):
        prune(net(), density=0.5, allocation="erkk")


def test_masks_of_another_model_are_refused() -> None:
    with pytest.raises(UserError, match="not a prunable parameter"):
        prune(nn.Linear(3, 3), density=0.5, masks=Masks.dense(net()))


def test_a_model_without_prunable_parameters_is_refused() -> None:
    with pytest.raises(UserError, match=r"no prunable parameter left; check pruning\.exclude"):
        prune(nn.BatchNorm2d(3), density=0.5)


def test_masks_and_exclude_are_not_both_accepted() -> None:
    model = net()
    with pytest.raises(ValueError, match="not both"):
        prune(model, density=0.5, masks=Masks.dense(model), exclude=["0.*"])


def test_wrappers_and_tied_weights() -> None:
    model = net()
    model[5] = nn.Linear(10, 8, bias=False)
    model[5].weight = model[4].weight = nn.Parameter(torch.randn(10, 8))
    masks = prune(model, density=0.5)
    assert list(masks) == ["0.weight", "2.weight", "4.weight"]
    assert prune(torch.compile(model, backend="eager"), density=0.5) == masks


def test_a_data_criterion_gets_the_bare_model_batches_and_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def gradient(model: Any, masks: Masks, batches: Any, loss: Any, *, generator: torch.Generator) -> dict[str, Tensor]:
        seen.update(model=model, batches=list(batches), again=list(batches), training=model.training)
        parameters = dict(model.named_parameters())
        total = sum(loss(model, batch) for batch in batches)
        grads = torch.autograd.grad(total, [parameters[name] for name in masks])
        return {name: (g * parameters[name]).detach().abs() for name, g in zip(masks, grads, strict=True)}

    with_criterion(monkeypatch, gradient, reads="train")
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batches = [(torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])) for _ in range(2)]
    masks = prune(model, density=0.5, criterion="mine", batches=iter(batches))
    assert masks.kept == 18
    assert seen["model"] is model
    assert seen["batches"] == seen["again"] == batches
    assert seen["training"] is False
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(UserError, match=r"pruning\.criterion=mine reads training batches and was given none"):
        prune(model, density=0.5, criterion="mine")


def test_wrong_scores_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    good = {name: torch.zeros(mask.shape) for name, mask in Masks.dense(net()).items()}
    wrong: list[tuple[dict[str, Tensor], str]] = [
        ({k: v for k, v in good.items() if k != "2.weight"}, "first difference: '2.weight'"),
        ({**good, "0.bias": torch.zeros(8)}, "first difference: '0.bias'"),
        ({**good, "4.weight": torch.zeros(8, 10)}, r"gave '4.weight' scores of shape \(8, 10\)"),
        ({**good, "4.weight": torch.zeros(10, 8, dtype=torch.int64)}, "torch.int64"),
    ]
    for scores, message in wrong:
        with_criterion(monkeypatch, lambda *_, scores=scores, **__: scores)
        with pytest.raises(RuntimeError, match=message):
            prune(net(), density=0.5, criterion="mine")


def test_a_criterion_that_changes_weights_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(model: Any, masks: Masks, *_: Any, **__: Any) -> dict[str, Tensor]:
        model[2].weight.data.abs_()
        return {name: p.detach().clone() for name, p in model.named_parameters() if name in masks}

    with_criterion(monkeypatch, careless)
    with pytest.raises(RuntimeError, match=r"scoring changed parameter '2.weight'"):
        prune(net(), density=0.5, criterion="mine")


@pytest.mark.parametrize(
    "faulty",
    [
        lambda layers, keep: [Pool(tuple(layers), keep - 1)],
        lambda layers, keep: [Pool(tuple(layers[1:]), keep)],
        lambda layers, keep: [Pool((layers[0],), keep), Pool(tuple(layers[1:]), 0)],
    ],
)
def test_an_allocation_that_miscounts_is_caught(monkeypatch: pytest.MonkeyPatch, faulty: Any) -> None:
    allocation.load()
    monkeypatch.setitem(allocation._entries, "mine", Entry("mine", faulty, {}))
    with pytest.raises(RuntimeError, match="allocation 'mine' does not hand out exactly"):
        prune(net(), density=0.9, allocation="mine")


def test_one_scoring_serves_many_densities() -> None:
    model = net()
    harness = PruningHarness(Pruning(), seed=0)
    full = Masks.dense(model)
    scores = harness.score(model, full)
    for density in (0.5, 0.1, 0.9):
        assert harness.select(scores, full, density) == harness.prune(model, full, density).masks
