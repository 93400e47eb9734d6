"""The level plan: densities from formulas, sources and lengths of levels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from utils.masks import Masks
from utils.params.load import build
from utils.params.plan import level_plan, target_densities
from utils.system.errors import ParamError


def densities(**keys: object) -> list[float]:
    return target_densities(build({key.replace("__", "."): value for key, value in keys.items()}))


def test_geometric_by_count_is_the_formula() -> None:
    assert densities(levels__count=25) == [(1.0 - 0.2) ** k for k in range(25)]
    assert densities(levels__count=25)[24] == pytest.approx(1 - 0.99528, abs=1e-5)  # the published 25 levels


@pytest.mark.parametrize(("target", "count"), [(0.5, 5), (0.8, 2), (0.81, 2), (0.001, 32), (1.0, 1)])
def test_geometric_ends_with_the_first_at_or_below_target(target: float, count: int) -> None:
    found = densities(levels__target=target)
    assert len(found) == count
    assert found[-1] <= target * (1 + 1e-9)
    assert all(density > target for density in found[:-1])


def test_count_and_target_end_at_whichever_comes_first() -> None:
    assert len(densities(levels__target=0.1, levels__count=3)) == 3
    assert len(densities(levels__target=0.5, levels__count=9)) == 5


def test_linear() -> None:
    assert densities(levels__spacing="linear", levels__target=0.2, levels__count=5) == pytest.approx(
        [1, 0.8, 0.6, 0.4, 0.2]
    )


def test_explicit_lists_begin_dense_unless_pruned_at_initialisation() -> None:
    assert densities(levels__densities=[0.5, 0.2]) == [1.0, 0.5, 0.2]
    assert densities(levels__densities=[1.0, 0.5]) == [1.0, 0.5]
    assert densities(levels__densities=[0.2, 0.5], pruning__moment="init") == [0.2, 0.5]
    assert densities(pruning__density=0.3, pruning__moment="init") == [0.3]
    assert densities(pruning__density=0.3, pruning__moment="oneshot") == [1.0, 0.3]


def test_sources_rewinds_and_lengths() -> None:
    plan = level_plan(build({"levels.densities": [0.5, 0.2], "levels.epochs": [4, 2, 1], "levels.rewind": "imp"}))
    assert [(p.number, p.source, p.epochs, p.rewind) for p in plan] == [
        (0, None, 4, None),
        (1, 0, 2, "imp"),
        (2, 1, 1, "imp"),
    ]
    plan = level_plan(build({"levels.densities": [0.5, 0.2], "pruning.moment": "oneshot"}))
    assert [(p.source, p.epochs) for p in plan] == [(None, 10), (0, 10), (0, 10)]
    plan = level_plan(build({"levels.densities": [0.5, 0.2], "pruning.moment": "init"}))
    assert [(p.source, p.rewind) for p in plan] == [(None, None), (None, None)]


def test_a_rate_that_never_arrives_is_refused() -> None:
    with pytest.raises(ParamError, match=r"levels\.rate=1e-06: 1000 levels do not reach"):
        densities(levels__rate=1e-6, levels__target=0.1)


def sourced(**keys: object) -> list[tuple[float, float, int | None, str | None]]:
    plan = level_plan(build({key.replace("__", "."): value for key, value in keys.items()}))
    return [(p.density, p.begins, p.source, p.rewind) for p in plan]


def test_moments_within_training_begin_dense_and_each_density_is_alone() -> None:
    step = {"pruning__moment": "step", "pruning__step": "3it"}
    assert sourced(**step, levels__densities=[0.5, 0.1]) == [(0.5, 1.0, None, None), (0.1, 1.0, None, None)]
    assert sourced(pruning__moment="early", pruning__density=0.1) == [(0.1, 1.0, None, None)]


def test_gradual_pruning_begins_at_its_first_density_and_the_others_at_their_own() -> None:
    init = {"pruning__moment": "init", "pruning__density": 0.1}
    assert sourced(**init, dynamic__method="gmp") == [(0.1, 1.0, None, None)]
    assert sourced(**init, dynamic__method="gmp", dynamic__initial_density=0.5) == [(0.1, 0.5, None, None)]
    assert sourced(**init, dynamic__method="rigl") == [(0.1, 0.1, None, None)]


def test_a_plan_goes_down_from_levels_start() -> None:
    assert densities(levels__start=0.4, levels__count=3, levels__rate=0.5) == [0.4, 0.2, 0.1]
    assert densities(levels__start=0.4, levels__densities=[0.2]) == [0.4, 0.2]
    assert densities(levels__start=0.4, levels__densities=[0.4, 0.2]) == [0.4, 0.2]
    assert densities(levels__start=0.4, pruning__moment="oneshot", pruning__density=0.1) == [0.4, 0.1]
    assert densities(levels__start=0.5, levels__target=0.1, levels__rate=0.5) == [0.5, 0.25, 0.125, 0.0625]
    linear = {"levels__spacing": "linear", "levels__target": 0.1, "levels__count": 3}
    assert densities(levels__start=0.5, **linear) == pytest.approx([0.5, 0.3, 0.1])


@pytest.fixture
def mask_file(tmp_path: Path) -> str:
    """Keeps 3 of 7 weights."""
    Masks({"w": torch.tensor([1, 1, 1, 0, 0, 0, 0]).bool()}).save(tmp_path / "m.safetensors")
    return str(tmp_path / "m.safetensors")


def test_a_plan_goes_down_from_a_mask_file(mask_file: str) -> None:
    given = {"pruning__mask_file": mask_file}
    assert densities(**given, levels__count=3, levels__rate=0.5) == [3 / 7, 3 / 7 * 0.5, 3 / 7 * 0.25]
    assert densities(**given, pruning__moment="init") == [3 / 7]
    assert densities(**given, pruning__moment="oneshot", pruning__density=0.2) == [3 / 7, 0.2]
    assert densities(**given, levels__densities=[0.2]) == [3 / 7, 0.2]
    # A rounded number names the file's own density.
    assert densities(**given, levels__densities=[0.43, 0.2]) == [0.43, 0.2]
    assert densities(**given, pruning__moment="init", pruning__density=0.43) == [0.43]
    step = {"pruning__moment": "step", "pruning__step": "3it", "pruning__density": 0.2}
    assert sourced(**given, **step) == [(0.2, 3 / 7, None, None)]


@pytest.mark.parametrize("content", [None, b"", b"no safetensors"])
def test_a_mask_file_that_cannot_be_read_is_one_line(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "m.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(
        ParamError, match=r"pruning\.mask_file: .*m\.safetensors: no(t a whole mask| such) file"
    ) as caught:
        densities(pruning__mask_file=str(path), levels__count=2)
    assert len(str(caught.value).splitlines()) == 1


def test_a_degree_settles_the_density_itself() -> None:
    plan = sourced(pruning__moment="init", graph__kind="rreg", graph__degree=3)
    assert [(source, rewind) for _, _, source, rewind in plan] == [(None, None)]
