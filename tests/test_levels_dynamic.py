"""Levels whose masks change while they train: gradual pruning, SET and RigL, end to end on digits."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from tests import levels_cases
from tests.levels_cases import row, rows, run
from utils import files
from utils.masks import Masks
from utils.params import Params
from utils.system.errors import UserError
from utils.system.rundir import RunDir

TOTAL = 270_896
"""Prunable weights of cifar/resnet20 for ten classes."""

ERK = {
    "pruning__moment": "init",
    "pruning__criterion": "random",
    "pruning__allocation": "erk",
    "pruning__density": 0.2,
}
SPARSE = {**ERK, "dynamic__every": 2}
"""Eight steps of training, updates at steps 2 and 4: below 0.75 * 8."""

GMP = {"pruning__moment": "init", "pruning__density": 0.1, "dynamic__method": "gmp", "dynamic__every": 2}


def config(root: Path, **keys: object) -> Params:
    return levels_cases.config(root, 2, **keys)


def epochs(directory: RunDir, column: str, level: int = 0) -> list[float | None]:
    return [float(row[column]) if row[column] else None for row in rows(directory.level(level).epochs)]


def exact(density: float, total: int = TOTAL) -> int:
    return int(density * total + 0.5)


def test_gmp_falls_along_the_cubic_to_exactly_its_density(tmp_path: Path) -> None:
    directory = run(config(tmp_path, **GMP))
    assert Masks.load(directory.level(0).start_mask).kept == TOTAL
    # Updates at steps 2 and 4 of 8; at 2 the cubic is half way: 0.1 + 0.9 (1 - 2/4)^3.
    halfway = exact(0.1 + 0.9 * 0.125)
    assert epochs(directory, "density") == [halfway / TOTAL, exact(0.1) / TOTAL]
    assert epochs(directory, "mask_updates") == [1, 1]
    assert epochs(directory, "regrown") == [0, 0]
    found = row(directory)
    assert int(found["kept_weights"]) == exact(0.1)
    assert (found["dynamic"], found["moment"], found["criterion"], found["target_density"]) == (
        "gmp",
        "init",
        "magnitude",
        "0.1",
    )
    mask = Masks.load(directory.level(0).mask)
    weights = files.load_weights(directory.level(0).weights)
    assert all(weights[name][~bits].eq(0).all() for name, bits in mask.items())
    counts = {line["name"]: int(line["kept"]) for line in rows(directory.level(0).layers) if line["name"] in mask}
    assert counts == dict(mask.counts)


def test_gmp_may_start_below_dense_and_keeps_inside(tmp_path: Path) -> None:
    directory = run(config(tmp_path, **GMP, dynamic__initial_density=0.8))
    begin, end = Masks.load(directory.level(0).start_mask), Masks.load(directory.level(0).mask)
    assert begin.kept == exact(0.8)
    assert end.kept == exact(0.1)
    assert end <= begin
    assert epochs(directory, "density") == [exact(0.1 + 0.7 * 0.125) / TOTAL, exact(0.1) / TOTAL]


def test_gmp_trains_each_density_from_the_same_weights(tmp_path: Path) -> None:
    keys = {key: value for key, value in GMP.items() if key != "pruning__density"}
    several = run(config(tmp_path / "both", **keys, levels__densities=[0.5, 0.1]))
    assert [int(line["kept_weights"]) for line in rows(several.levels_csv)] == [exact(0.5), exact(0.1)]


@pytest.mark.parametrize("method", ["set", "rigl"])
def test_drop_and_grow_keeps_every_layers_count(tmp_path: Path, method: str) -> None:
    directory = run(config(tmp_path, **SPARSE, dynamic__method=method))
    begin, end = Masks.load(directory.level(0).start_mask), Masks.load(directory.level(0).mask)
    still = run(config(tmp_path / "still", **ERK))
    assert begin.digest == Masks.load(still.level(0).mask).digest
    assert begin.counts == end.counts
    assert end.kept == exact(0.2)
    assert begin.digest != end.digest
    regrown = epochs(directory, "regrown")
    assert all(count is not None and count > 0 for count in regrown)
    assert epochs(directory, "density") == [exact(0.2) / TOTAL] * 2
    found = row(directory)
    assert (found["dynamic"], found["mask_digest"]) == (method, end.digest)
    assert found["weights_digest"] != row(still)["weights_digest"]
    weights = files.load_weights(directory.level(0).weights)
    assert all(weights[name][~bits].eq(0).all() for name, bits in end.items())
    # What grew at the last update has been trained since.
    assert all(
        weights[name][bits & ~begin[name]].ne(0).any() for name, bits in end.items() if (bits & ~begin[name]).any()
    )


def test_drop_and_grow_under_iterative_levels_prunes_what_each_level_ends_with(tmp_path: Path) -> None:
    directory = run(config(tmp_path, levels__densities=[0.5, 0.2], dynamic__method="rigl", dynamic__every=2))
    ends = [Masks.load(directory.level(n).mask) for n in range(3)]
    begins = [Masks.load(directory.level(n).start_mask) for n in range(3)]
    assert [mask.kept for mask in ends] == [TOTAL, exact(0.5), exact(0.2)]
    for before, after in itertools.pairwise(range(3)):
        assert begins[after] <= ends[before]
    assert not ends[2] <= begins[1]
    assert [line["dynamic"] for line in rows(directory.levels_csv)] == ["rigl"] * 3


@pytest.mark.parametrize("method", ["gmp", "rigl"])
def test_an_average_never_holds_a_pruned_weight(tmp_path: Path, method: str) -> None:
    keys = GMP if method == "gmp" else SPARSE
    directory = run(config(tmp_path, **{**keys, "dynamic__method": method}, training__ema=0.9))
    mask = Masks.load(directory.level(0).mask)
    raw, average = (files.load_weights(p) for p in (directory.level(0).weights, directory.level(0).average))
    assert all(average[name][~bits].eq(0).all() for name, bits in mask.items())
    assert not torch.equal(raw["conv1.weight"], average["conv1.weight"])


@pytest.mark.parametrize(
    "keys",
    [
        {**GMP, "pruning__criterion": "taylor", "pruning__samples_per_class": 1},
        {**SPARSE, "dynamic__method": "set", "dynamic__decay": "constant"},
        {**SPARSE, "dynamic__method": "rigl", "training__accumulation": 2, "training__clip": 0.5, "training__ema": 0.9},
        {**SPARSE, "dynamic__method": "rigl", "optimizer__name": "adamw", "optimizer__lr": 0.001},
    ],
)
def test_a_run_repeats_bit_for_bit_and_a_lost_row_comes_back(tmp_path: Path, keys: dict) -> None:
    first, second = run(config(tmp_path / "a", **keys)), run(config(tmp_path / "b", **keys))
    digests = [(row(d)["mask_digest"], row(d)["weights_digest"]) for d in (first, second)]
    assert digests[0] == digests[1]
    stamp = first.level(0).row.stat().st_mtime_ns
    run(config(tmp_path / "a", **keys))
    assert first.level(0).row.stat().st_mtime_ns == stamp
    first.level(0).row.unlink()
    run(config(tmp_path / "a", **keys))
    assert (row(first)["mask_digest"], row(first)["weights_digest"]) == digests[0]


def test_updates_start_from_a_mask_file(tmp_path: Path) -> None:
    still = run(config(tmp_path / "still", **ERK))
    mask = still.level(0).mask
    directory = run(
        config(tmp_path, pruning__moment="init", pruning__mask_file=str(mask), dynamic__method="set", dynamic__every=2)
    )
    assert Masks.load(directory.level(0).start_mask).digest == Masks.load(mask).digest
    assert Masks.load(directory.level(0).mask).counts == Masks.load(mask).counts


def test_a_gradual_pruning_that_cuts_the_network_stops(tmp_path: Path) -> None:
    keys = {**GMP, "pruning__density": 0.0002}
    with pytest.raises(UserError, match=r"no path is left from input to output") as caught:
        run(config(tmp_path, **keys))
    assert "\n" not in str(caught.value)
    allowed = run(config(tmp_path, **keys, pruning__allow_disconnected=True))
    assert int(row(allowed)["kept_weights"]) == exact(0.0002)
    assert float(row(allowed)["effective_density"]) == 0.0
