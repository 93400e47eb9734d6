"""From scores to masks, for every allocation and pattern: counts, limits, floors, dense layers, ties and seeds."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from utils.masks import Masks
from utils.params.pruning import Pruning
from utils.pruning.allocations import allocation
from utils.pruning.choose import choose, layer_counts, plan
from utils.pruning.patterns import labels, outside, parse
from utils.system.errors import UserError

SHAPES: dict[str, tuple[int, ...]] = {
    "stem": (4, 3, 3, 3),
    "depthwise": (4, 1, 3, 3),
    "point": (6, 4, 1, 1),
    "single": (1, 1),
    "fc": (5, 8),
}
KINDS = ["balanced", "er", "erk", "global", "uniform"]
GROUPED = ["block=2x2", "block=1x4", "kernel", "channel"]
PATTERNS = st.sampled_from(GROUPED)
SHARES = st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1))
VALUES = torch.tensor([0.0, -0.0, 1.0, 1.0, -3.0, 0.25, math.inf, -math.inf])


def dense(pattern: str = "weight") -> Masks:
    whole = outside(pattern, SHAPES)
    return Masks({name: torch.ones(shape, dtype=torch.bool) for name, shape in SHAPES.items() if name not in whole})


def random_scores(masks: Masks, seed: int, tied: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if tied:
        return {name: VALUES[torch.randint(0, 8, mask.shape, generator=generator)] for name, mask in masks.items()}
    return {name: torch.randn(mask.shape, generator=generator) for name, mask in masks.items()}


def thinned(masks: Masks, share: float, seed: int) -> Masks:
    generator = torch.Generator().manual_seed(seed)
    return Masks({name: torch.rand(mask.shape, generator=generator) < share for name, mask in masks.items()})


def refusal(action: Any) -> str | None:
    try:
        action()
    except UserError as error:
        return str(error)
    return None


SETTINGS = st.fixed_dictionaries({
    "allocation": st.sampled_from(KINDS),
    "min_kept": st.sampled_from([0, 0, 1, 2, 7, 1000]),
    "first_layer": st.sampled_from(["prune", "prune", "dense"]),
    "last_layer": st.sampled_from(["prune", "prune", "dense"]),
    "layer_densities": st.sampled_from([(), (), ("point=0.5",), ("s*=0.25",), ("depthwise=0",)]),
})  # fmt: skip


@given(SETTINGS, SHARES, st.sampled_from([1.0, 0.6]), st.booleans(), st.integers(0, 3))
@settings(max_examples=400, deadline=None)
def test_single_weights_are_exact_or_refused_beforehand(
    given_settings: dict[str, Any], share: float, before: float, tied: bool, seed: int
) -> None:
    section, masks = Pruning(**given_settings), thinned(dense(), before, 1)
    assume(section.first_layer == "prune" or section.layer_densities != ("s*=0.25",))
    density, scores = share * masks.density, random_scores(masks, seed, tied)
    said = refusal(lambda: plan(section, masks).pruned(density))
    keep = math.floor(density * masks.total + 0.5)
    fixed = plan(section, masks).goals
    free = {name: n for name, n in masks.counts.items() if name not in fixed}
    floors = sum(min(section.min_kept, n) for n in free.values())
    room = sum(fixed.values()) + floors <= keep <= sum(fixed.values()) + sum(free.values())
    possible = room and all(fixed[name] <= masks.counts[name] for name in fixed)
    nothing = keep == masks.total or (keep == masks.kept and all(masks.counts[n] == fixed[n] for n in fixed))
    assert (said is None) == (possible or nothing)
    assert refusal(lambda: choose(scores, masks, density, section, seed)) == said
    if said is not None:
        return
    found = choose(scores, masks, density, section, seed)
    assert found.kept == keep
    assert found <= masks
    assert found == choose(scores, masks, density, section, seed)
    if not nothing:
        assert {name: found.counts[name] for name in fixed} == fixed
    for name, alive in free.items():
        assert found.counts[name] >= min(section.min_kept, alive)


@given(
    SETTINGS, st.lists(st.floats(0, 1), min_size=1, max_size=4), st.sampled_from([1.0, 0.7]), st.sampled_from(GROUPED)
)
@settings(max_examples=250, deadline=None)
def test_what_counts_let_pass_can_be_pruned_to_whole_groups(
    given_settings: dict[str, Any], densities: list[float], before: float, pattern: str
) -> None:
    section, masks = Pruning(pattern=pattern, **given_settings), thinned(dense(pattern), before, 2)
    assume(section.first_layer == "prune" or section.layer_densities != ("s*=0.25",))
    counts = plan(section, masks)
    for position, density in enumerate(sorted(densities, reverse=True)):
        if refusal(lambda: counts.pruned(density)) is not None:  # noqa: B023 - called at once
            return
        counts = counts.pruned(density)
        scores = random_scores(masks, position, tied=position % 2 == 1)
        found = choose(scores, masks, density, section, seed=position)
        check_groups(found, masks, math.floor(density * masks.total + 0.5), section)
        masks = found


def check_groups(found: Masks, masks: Masks, keep: int, section: Pruning) -> None:
    """Whole live groups, no more weights than asked, and no group left out of free layers that still fits."""
    assert found <= masks
    assert found.kept <= keep
    fixed = plan(section, masks).goals
    for name, mask in masks.items():
        group = torch.from_numpy(labels(parse(section.pattern), mask.shape)).long()
        kept, live = found[name].reshape(-1), mask.reshape(-1)
        assert found.counts[name] <= fixed.get(name, masks.total) or found is masks
        for label in range(int(group.max()) + 1):
            places = (group == label) & live
            assert int(kept[places].sum()) in (0, int(places.sum()))
            if name not in fixed and places.any() and not kept[places].any():
                assert int(places.sum()) > keep - found.kept
        if name not in fixed:
            assert found.counts[name] >= min(section.min_kept, masks.counts[name])
        elif found is not masks:
            assert found.counts[name] > fixed[name] - int(group.bincount().max())


@pytest.mark.parametrize("pattern", GROUPED)
def test_whole_groups_of_one_size_miss_less_than_one_group(pattern: str) -> None:
    masks = Masks({f"conv{i}": torch.ones(8, 4, 3, 3, dtype=torch.bool) for i in range(3)})
    size = {"block=2x2": 4, "block=1x4": 4, "kernel": 9, "channel": 36}[pattern]
    for kind, density in itertools.product(KINDS, (0.0, 0.013, 0.1, 0.37, 0.5, 0.99, 1.0)):
        found = choose(random_scores(masks, 3), masks, density, Pruning(pattern=pattern, allocation=kind), 0)
        assert found.kept == math.floor(density * masks.total + 0.5) // size * size


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_global_pool_with_floors_keeps_the_highest_sum_that_meets_them(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    value = st.sampled_from([-2.0, 0.0, 1.0, 1.0, 4.0, 7.0])
    scores = {f"{i}": torch.tensor(data.draw(st.lists(value, min_size=n, max_size=n))) for i, n in enumerate(sizes)}
    masks = Masks({f"{i}": torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
                   for i, n in enumerate(sizes)})  # fmt: skip
    least = data.draw(st.integers(0, 3))
    keep = data.draw(st.integers(sum(min(least, n) for n in masks.counts.values()), masks.kept))
    live = [(name, i) for name, mask in masks.items() for i in range(len(mask)) if mask[i]]
    best = max(
        sum(scores[name][i].item() for name, i in subset)
        for subset in itertools.combinations(live, keep)
        if all(sum(name == at[0] for at in subset) >= min(least, n) for name, n in masks.counts.items())
    )
    found = choose(scores, masks, keep / masks.total, Pruning(min_kept=least), 0)
    assert sum(scores[name][mask].sum().item() for name, mask in found.items()) == best


@pytest.mark.parametrize("kind", KINDS)
def test_floors_that_ask_too_much_name_the_smallest_density(kind: str) -> None:
    section = Pruning(min_kept=10, allocation=kind)
    with pytest.raises(UserError, match=r"^pruning\.min_kept: .* at least 41 weights.* smallest feasible") as caught:
        choose(random_scores(dense(), 0), dense(), 0.1, section, 0)
    named = float(str(caught.value).rpartition(" ")[2])
    found = choose(random_scores(dense(), 0), dense(), named, section, 0)
    assert list(found.counts.values()) == [10, 10, 10, 1, 10]
    with pytest.raises(UserError, match=r"pruning\.min_kept"):
        choose(random_scores(dense(), 0), dense(), (41 - 1) / dense().total, section, 0)


def test_layers_of_layer_densities_have_no_floor() -> None:
    section = Pruning(min_kept=10, layer_densities=("point=0", "fc=0.05"))
    found = choose(random_scores(dense(), 0), dense(), 0.3, section, 0)
    assert found.counts["point"] == 0
    assert found.counts["fc"] == 2
    assert found.counts["depthwise"] >= 10


def test_dense_layers_keep_what_lives_and_count() -> None:
    masks = thinned(dense(), 0.8, 5)
    section = Pruning(first_layer="dense", last_layer="dense", allocation="erk")
    found = choose(random_scores(masks, 0), masks, 0.6, section, 0)
    assert torch.equal(found["stem"], masks["stem"])
    assert torch.equal(found["fc"], masks["fc"])
    assert found.kept == math.floor(0.6 * masks.total + 0.5)
    whole = masks.counts["stem"] + masks.counts["fc"]
    with pytest.raises(
        UserError, match=r"^pruning\.first_layer, pruning\.last_layer: the fixed layers alone"
    ) as caught:
        choose(random_scores(masks, 0), masks, 0.3, section, 0)
    assert float(str(caught.value).rpartition(" ")[2]) == whole / masks.total
    assert choose(random_scores(masks, 0), masks, whole / masks.total, section, 0).kept == whole


def test_dense_layers_come_before_layer_densities() -> None:
    both = Pruning(first_layer="dense", layer_densities=("s*=0",))
    found = choose(random_scores(dense(), 0), dense(), 0.8, both, 0)
    assert found.counts["stem"] == 108
    assert found.counts["single"] == 0
    with pytest.raises(UserError, match=r"'stem' is never used, pruning\.first_layer=dense keeps 'stem' whole"):
        plan(Pruning(first_layer="dense", layer_densities=("stem=0.5",)), dense())


@pytest.mark.parametrize("pattern", ["weight", "kernel", "channel", "block=2x2", "1:2", "1:4"])
@pytest.mark.parametrize("tied", [False, True])
def test_seeds_decide_ties_alone(pattern: str, tied: bool) -> None:
    names = [name for name in dense(pattern) if name != "single"]
    masks = Masks({name: dense(pattern)[name] for name in names})
    scores = {name: torch.zeros_like(s) if tied else s for name, s in random_scores(masks, 1).items()}
    density = 0.25 if pattern == "1:4" else 0.5
    first, again, other = (choose(scores, masks, density, Pruning(pattern=pattern), seed) for seed in (1, 1, 2))
    assert first == again
    assert (first == other) is not tied


@pytest.mark.parametrize("text", ["1:2", "2:4", "3:4", "1:4", "2:8"])
def test_n_of_m_keeps_exactly_its_share(text: str) -> None:
    masks = Masks({"a": torch.ones(3, 8, 2, 2, dtype=torch.bool), "b": torch.ones(5, 16, dtype=torch.bool)})
    n, m = map(int, text.split(":"))
    scores = random_scores(masks, 0, tied=True)
    section = Pruning(pattern=text)
    found = choose(scores, masks, n / m, section, 0)
    assert found.kept * m == masks.total * n
    for name, mask in found.items():
        for label in range(masks[name].numel() // m):
            assert int(mask.reshape(-1)[labels(parse(text), mask.shape) == label].sum()) == n
    assert choose(scores, found, n / m, section, 0) is found
    assert choose(scores, masks, 1.0, section, 0) is masks
    with pytest.raises(
        UserError, match=rf"^pruning\.pattern={text} keeps {n / m} of .*; set pruning\.density={n / m}$"
    ):
        choose(scores, masks, 0.4, section, 0)


def test_n_of_m_refuses_what_has_no_place() -> None:
    masks = Masks({"a": torch.ones(3, 8, dtype=torch.bool)})
    others: list[tuple[str, dict[str, Any]]] = [
        ("pruning.allocation=erk", {"allocation": "erk"}),
        ("pruning.layer_densities", {"layer_densities": ("a=0.5",)}),
        ("pruning.min_kept=1", {"min_kept": 1}),
        ("pruning.first_layer=dense", {"first_layer": "dense"}),
        ("pruning.last_layer=dense", {"last_layer": "dense"}),
    ]
    for key, option in others:
        with pytest.raises(UserError, match=rf"^{key.replace('.', chr(92) + '.')}: has no place with .*pattern=2:4"):
            plan(Pruning(pattern="2:4", **option), masks)
    with pytest.raises(UserError, match=r"inputs of 'a' do not divide by 5; add it to pruning\.exclude"):
        plan(Pruning(pattern="2:5"), masks)
    masks["a"][1, :3] = False
    with pytest.raises(UserError, match=r"pruning\.pattern=2:4: 'a' has a group with fewer than 2 live weights"):
        plan(Pruning(pattern="2:4"), Masks(masks)).pruned(0.5)
    assert choose({"a": torch.rand(3, 8)}, Masks(masks), 0.25, Pruning(pattern="1:4"), 0).kept == 6


def test_ratios_follow_another_mask(tmp_path: Path) -> None:
    other = thinned(dense(), 0.3, 7)
    other.save(tmp_path / "m.safetensors")
    section = Pruning(allocation="from_mask", from_mask=str(tmp_path / "m.safetensors"))
    scores = random_scores(dense(), 0)
    assert choose(scores, dense(), other.density, section, 0).counts == other.counts
    half = choose(scores, dense(), other.density / 2, section, 0)
    assert all(abs(half.counts[n] - half.kept * c / other.kept) < 1 for n, c in other.counts.items())
    for density in (0.0, 0.1, 0.77, 0.999, 1.0):
        assert choose(scores, dense(), density, section, 0).kept == math.floor(density * dense().total + 0.5)


def test_layers_a_file_empties_are_filled_last(tmp_path: Path) -> None:
    other = Masks({name: mask & (name in ("stem", "point")) for name, mask in dense().items()})
    other.save(tmp_path / "m.safetensors")
    section = Pruning(allocation="from_mask", from_mask=str(tmp_path / "m.safetensors"))
    total, held = dense().total, 108 + 24
    below = choose(random_scores(dense(), 0), dense(), (held - 5) / total, section, 0)
    assert [below.counts[name] for name in ("depthwise", "single", "fc")] == [0, 0, 0]
    above = choose(random_scores(dense(), 0), dense(), (held + 22) / total, section, 0)
    assert list(above.counts.values()) == [108, 10, 24, 0, 12]  # 22 over 36, 1 and 40: 10.3, 0.3 and 11.4


def test_files_of_other_layers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    section = Pruning(allocation="from_mask", from_mask=str(path))
    with pytest.raises(UserError, match=r"pruning\.from_mask: not set, and pruning\.allocation=from_mask needs it"):
        plan(Pruning(allocation="from_mask"), dense())
    with pytest.raises(UserError, match=r"pruning\.from_mask: no file"):
        plan(section, dense())
    wrong: list[tuple[dict[str, Tensor], str]] = [
        ({name: mask for name, mask in dense().items() if name != "fc"}, "has no mask for 'fc' where .* shape 5x8"),
        ({**dense(), "fc": torch.ones(8, 5, dtype=torch.bool)}, "has shape 8x5 for 'fc' where .* have shape 5x8"),
        ({**dense(), "more": torch.ones(2, dtype=torch.bool)}, "has shape 2 for 'more' where .* have no mask"),
        ({name: torch.zeros_like(mask) for name, mask in dense().items()}, "keeps no weight"),
    ]
    for tensors, message in wrong:
        Masks(tensors).save(path)
        with pytest.raises(UserError, match=rf"^pruning\.from_mask: .*{message}"):
            plan(section, dense())
    Masks(dense()).save(path)
    plan(Pruning(allocation="from_mask", from_mask=str(path), pattern="channel"), dense("channel"))


@pytest.mark.parametrize("kind", ["uniform", "erk", "balanced"])
def test_layer_counts_are_those_of_the_allocation(kind: str) -> None:
    section = Pruning(allocation=kind, min_kept=3, last_layer="dense")
    found = choose(random_scores(dense(), 0), dense(), 0.4, section, 0)
    assert layer_counts(dense(), 0.4, section, 0) == found.counts


def test_layer_counts_without_scores_share_a_pool_evenly() -> None:
    section = Pruning(min_kept=1)
    assert layer_counts(dense(), 0.5, section, 0) == choose(
        random_scores(dense(), 0), dense(), 0.5, Pruning(allocation="uniform", min_kept=1), 0
    ).counts  # fmt: skip
    assert layer_counts(dense(), 1.0, section, 0) == dense().counts
    with pytest.raises(UserError, match=r"pruning\.pattern=kernel: layer graphs have their own pattern"):
        layer_counts(dense(), 0.5, Pruning(pattern="kernel"), 0)


def test_all_allocations_are_tested_here() -> None:
    assert sorted([*KINDS, "from_mask"]) == allocation.names()
