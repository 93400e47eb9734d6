"""Runs that start from a mask file or from a sparse level 0, end to end on digits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests import levels_cases
from tests.levels_cases import row, rows, run
from utils import files, models
from utils.masks import Masks
from utils.params import Params
from utils.system.errors import UserError
from utils.system.rundir import RunDir

TOTAL = 270_896
"""Prunable weights of cifar/resnet20 for ten classes."""

INIT = {"pruning__moment": "init", "pruning__density": 0.2}
ITERATIVE = {"levels__count": 3, "levels__rate": 0.5}


def config(root: Path, **keys: object) -> Params:
    return levels_cases.config(root, 1, **keys)


def epochs(directory: RunDir, column: str, level: int = 0) -> list[float | None]:
    return [float(row[column]) if row[column] else None for row in rows(directory.level(level).epochs)]


def exact(density: float, total: int = TOTAL) -> int:
    return int(density * total + 0.5)


def kept(directory: RunDir) -> list[int]:
    return [int(line["kept_weights"]) for line in rows(directory.levels_csv)]


def mask(directory: RunDir, level: int = 0) -> Masks:
    return Masks.load(directory.level(level).mask)


def flat(found: Masks) -> torch.Tensor:
    return torch.cat([bits.flatten() for bits in found.values()])


# Mask files -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ticket(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mask file with a density of its own in every layer."""
    model, generator = models.build("cifar/resnet20", 10), torch.Generator().manual_seed(1)
    dense = Masks.dense(model)
    found = {
        name: torch.rand(m.shape, generator=generator) < 0.3 + 0.02 * n for n, (name, m) in enumerate(dense.items())
    }
    path = tmp_path_factory.mktemp("ticket") / "mask.safetensors"
    Masks(found).save(path)
    return path


@pytest.mark.parametrize("rounded", [False, True])
def test_a_mask_file_is_trained_as_it_is(tmp_path: Path, ticket: Path, rounded: bool) -> None:
    given = Masks.load(ticket)
    keys = {"pruning__density": round(given.density, 7)} if rounded else {}
    directory = run(config(tmp_path, pruning__moment="init", pruning__mask_file=str(ticket), **keys))
    assert mask(directory).digest == given.digest
    line = row(directory)
    assert (line["criterion"], line["allocation"], line["rounds"]) == ("file mask.safetensors",) * 2 + ("",)
    inputs = json.loads(directory.environment.read_text())["inputs"]
    assert len(inputs["mask file"]) == 64


@pytest.mark.parametrize("moment", ["levels", "oneshot"])
def test_levels_start_from_a_mask_file(tmp_path: Path, ticket: Path, moment: str) -> None:
    given = Masks.load(ticket)
    keys = ITERATIVE if moment == "levels" else {"levels__densities": [0.2, 0.1]}
    directory = run(config(tmp_path, pruning__moment=moment, pruning__mask_file=str(ticket), **keys))
    masks = [mask(directory, level) for level in range(3)]
    assert masks[0].digest == given.digest
    goals = [exact(given.density * 0.5**k) for k in (1, 2)] if moment == "levels" else [exact(0.2), exact(0.1)]
    assert [found.kept for found in masks[1:]] == goals
    assert masks[1] <= masks[0]
    assert masks[2] <= masks[0 if moment == "oneshot" else 1]
    assert [line["criterion"] for line in rows(directory.levels_csv)] == [
        "file mask.safetensors",
        "magnitude",
        "magnitude",
    ]


def test_another_mask_file_under_the_same_name_is_refused(tmp_path: Path, ticket: Path) -> None:
    path = tmp_path / "mask.safetensors"
    path.write_bytes(ticket.read_bytes())
    keys = {"pruning__moment": "init", "pruning__mask_file": str(path), "training__epochs": 0}
    run(config(tmp_path / "runs", **keys))
    Masks({name: bits.flip(0) for name, bits in Masks.load(ticket).items()}).save(path)
    with pytest.raises(UserError, match=r"mask file was [0-9a-f]{16} when this run began") as caught:
        run(config(tmp_path / "runs", **keys))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"pruning__moment": "init", "pruning__density": 0.9},
            r"pruning\.density: 0\.9 is above 0\.\d+, which level 0",
        ),
        ({"pruning__moment": "oneshot", "pruning__density": 0.9}, r"pruning\.density: 0\.9 is above"),
        ({"pruning__moment": "oneshot", "levels__densities": [0.2, 0.9]}, r"levels\.densities: 0\.9 is above"),
        ({"pruning__moment": "step", "pruning__step": "1it"}, r"pruning\.moment=step: prunes nothing"),
        ({"pruning__moment": "init", "pruning__criterion": "snip"}, r"pruning\.criterion=snip: has no effect"),
        ({"pruning__moment": "init", "pruning__control": "shuffle"}, r"pruning\.control=shuffle: has no effect"),
        ({**ITERATIVE, "pruning__pattern": "2:4"}, r"mask\.safetensors.*pruning\.exclude or the pattern"),
        ({"pruning__moment": "init", "model__name": "cifar/resnet32"}, r"mask\.safetensors"),
    ],
)
def test_a_mask_file_that_does_not_fit_is_refused(tmp_path: Path, ticket: Path, keys: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        run(config(tmp_path / "runs", pruning__mask_file=str(ticket), **keys))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_a_mask_file_of_other_parameters_is_refused(tmp_path: Path) -> None:
    """Its density would be another share of the weights here, and level 0 would be pruned without a word."""
    half = run(config(tmp_path / "half", **INIT, pruning__exclude=["layer3*"], training__epochs=0))
    keys = {"pruning__moment": "init", "pruning__mask_file": str(half.level(0).mask), "training__epochs": 0}
    with pytest.raises(UserError, match=r"pruning\.mask_file: .* set both as for the file"):
        run(config(tmp_path / "runs", **keys))
    same = run(config(tmp_path / "runs", **keys, pruning__exclude=["layer3*"]))
    assert mask(same).digest == mask(half).digest


# Starting levels sparse -----------------------------------------------------------------------------------------------


def test_an_iterative_run_starts_at_a_density_by_a_criterion_of_its_own(tmp_path: Path) -> None:
    keys = {"levels__start": 0.4, "levels__start_criterion": "snip", "pruning__samples_per_class": 1}
    directory = run(config(tmp_path / "s", **ITERATIVE, **keys))
    assert kept(directory) == [exact(0.4), exact(0.2), exact(0.1)]
    alone = {"pruning__criterion": "snip", "pruning__samples_per_class": 1, "pruning__density": 0.4}
    init = run(config(tmp_path / "i", pruning__moment="init", **alone))
    assert mask(directory).digest == mask(init).digest
    assert row(directory)["weights_digest"] == row(init)["weights_digest"]
    assert mask(directory, 2) <= mask(directory, 1) <= mask(directory, 0)
    # From there on by magnitude, of the weights level 0 has trained.
    trained = files.load_weights(directory.level(0).weights)
    sizes = torch.cat([trained[name].abs().flatten() for name in mask(directory)])
    chosen = torch.zeros(TOTAL, dtype=torch.bool)
    chosen[sizes.argsort(descending=True)[: exact(0.2)]] = True
    assert torch.equal(flat(mask(directory, 1)), chosen)
    found = rows(directory.levels_csv)
    assert [line["criterion"] for line in found] == ["snip", "magnitude", "magnitude"]
    assert [line["rounds"] for line in found] == ["1", "1", "1"]


def test_a_start_may_have_an_allocation_of_its_own(tmp_path: Path) -> None:
    keys = {"levels__start": 0.4, "levels__start_criterion": "random", "levels__start_allocation": "erk"}
    directory = run(config(tmp_path / "s", **ITERATIVE, **keys, training__epochs=0))
    erk = {"pruning__criterion": "random", "pruning__allocation": "erk", "pruning__density": 0.4}
    init = run(config(tmp_path / "i", pruning__moment="init", **erk, training__epochs=0))
    assert mask(directory).digest == mask(init).digest
    assert [line["allocation"] for line in rows(directory.levels_csv)] == ["erk", "global", "global"]
