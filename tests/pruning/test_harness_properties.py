"""Every criterion with every allocation and pattern: exact counts, subsets, repetition, an untouched model."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from utils.masks import Masks
from utils.params.pruning import Pruning
from utils.pruning.allocations import allocation
from utils.pruning.criteria import criterion
from utils.pruning.harness import PruningHarness
from utils.system.errors import UserError

SHAPE = (2, 4, 4)
PATTERNS = {"weight": 1, "kernel": 9, "block=1x2": 18, "2:4": 1, "channel": 36}
"""The largest group of each pattern in `net`, by which whole groups may miss a count."""


def net() -> nn.Sequential:
    """Layers of 72, 144, 32, 1 and 12 weights, of every dimension."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Flatten(1),
        nn.AvgPool1d(8), nn.Linear(8, 4), nn.Unflatten(1, (1, 4)),
        nn.Conv1d(1, 1, 1), nn.Flatten(1), nn.Linear(4, 3, bias=False),
    )  # fmt: skip


def images() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, *SHAPE, generator=generator), torch.arange(n) % 3) for n in (3, 4)]


@pytest.fixture(scope="module")
def mask_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("masks") / "m.safetensors"
    generator = torch.Generator().manual_seed(9)
    Masks({n: torch.rand(m.shape, generator=generator) < 0.4 for n, m in Masks.dense(net()).items()}).save(path)
    return path


def section_of(name: str, kind: str, pattern: str, path: Path, **more: Any) -> Pruning:
    options = ("draws=1", "samples=4") if name == "ntk_sap" else ()
    file = str(path) if kind == "from_mask" else None
    return Pruning(
        criterion=name, criterion_options=options, allocation=kind, pattern=pattern, from_mask=file, **more
    )  # fmt: skip


def state(model: nn.Module) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in model.state_dict().items()}


@functools.cache
def scores(name: str, path: Path) -> tuple[dict[str, Tensor], ...]:
    """Scores of the dense network, for tests that only select."""
    model = net()
    harness = PruningHarness(section_of(name, "global", "weight", path), seed=0, input_shape=SHAPE)
    return (harness.score(model, Masks.dense(model), images()),)


@pytest.mark.parametrize("kind", allocation.names())
@pytest.mark.parametrize("name", criterion.names())
def test_all_pairs_prune_in_two_rounds_and_leave_the_model_alone(name: str, kind: str, mask_file: Path) -> None:
    model = net().train()
    before = state(model)
    made = [
        PruningHarness(section_of(name, kind, "weight", mask_file, rounds=2), seed=3, input_shape=SHAPE)
        for _ in range(2)
    ]
    start = made[0].start(model)
    halfway = made[0].prune(model, start, 0.6, images()).masks
    pruned = made[0].prune(model, halfway, 0.23, images())
    assert pruned.masks <= halfway <= start
    assert halfway.kept == math.floor(0.6 * start.total + 0.5)
    assert pruned.masks.kept == math.floor(0.23 * start.total + 0.5)
    assert pruned == made[1].prune(net(), made[1].prune(net(), None, 0.6, images()).masks, 0.23, images())
    assert state(model) == before
    assert model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", criterion.names())
@given(
    kind=st.sampled_from(allocation.names()),
    pattern=st.sampled_from([p for p in PATTERNS if p != "2:4"]),
    densities=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    floor=st.integers(0, 2),
    seed=st.integers(0, 2),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_selection_is_exact_nested_and_repeatable(
    name: str,
    kind: str,
    pattern: str,
    densities: tuple[float, float],
    floor: int,
    seed: int,
    mask_file: Path,
) -> None:
    section = section_of(name, kind, pattern, mask_file, min_kept=floor)
    harness = PruningHarness(section, seed=seed, input_shape=SHAPE)
    masks, (found,) = harness.start(net()), scores(name, mask_file)
    found = {key: found[key] for key in masks}
    for density in sorted(densities, reverse=True):
        wanted = math.floor(density * masks.total + 0.5)
        try:
            harness.check(masks, [density], iterative=False)
            refused = ""
        except UserError as error:
            refused = str(error)
        if refused:
            with pytest.raises(UserError) as same:
                harness.select(found, masks, density)
            assert str(same.value) == refused
            assert floor or wanted > masks.kept
            return
        after = harness.select(found, masks, density)
        assert after <= masks
        assert wanted - PATTERNS[pattern] < after.kept <= max(wanted, 0)
        if pattern == "weight":
            assert after.kept == wanted
        assert all(count >= min(floor, masks.counts[key]) for key, count in after.counts.items())
        again = PruningHarness(section, seed=seed, input_shape=SHAPE)
        assert again.select(found, masks, density).digest == after.digest
        masks = after


@pytest.mark.parametrize("control", ["none", "invert"])
@pytest.mark.parametrize("name", criterion.names())
def test_two_of_four_of_every_criterion(name: str, control: str, mask_file: Path) -> None:
    """By enumeration: in every group of four inputs the two best stay."""
    model = net()
    section = section_of(name, "global", "2:4", mask_file, control=control, rounds=1)
    harness = PruningHarness(section, seed=0, input_shape=SHAPE)
    start = harness.start(model)
    assert list(start) == ["3.weight", "7.weight", "11.weight"]
    found = harness.prune(model, start, 0.5, images()).masks
    values = harness.score(model, start, images())
    for key, mask in found.items():
        sign = -1.0 if control == "invert" else 1.0
        kept = mask.movedim(1, -1).reshape(-1, 4)
        score = sign * values[key].movedim(1, -1).reshape(-1, 4)
        assert kept.sum(1).tolist() == [2] * len(kept)
        for group, choice in zip(score, kept, strict=True):
            assert group[choice].min() >= group[~choice].max()
