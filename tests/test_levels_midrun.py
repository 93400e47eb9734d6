"""Levels pruned while they train: at a step, and early, once a trigger fires; end to end on digits."""

from __future__ import annotations

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
from utils.training.trainer import Trainer

TOTAL = 270_896
"""Prunable weights of cifar/resnet20 for ten classes."""

STEP = {"pruning__moment": "step", "pruning__density": 0.2}
EARLY = {"pruning__moment": "early", "pruning__density": 0.2}
DENSE = {"pruning__moment": "init", "pruning__density": 1.0}
State = dict[str, torch.Tensor]


def config(root: Path, **keys: object) -> Params:
    return levels_cases.config(root, 2, **keys)


def epochs(directory: RunDir, column: str, level: int = 0) -> list[float | None]:
    return [float(row[column]) if row[column] else None for row in rows(directory.level(level).epochs)]


def exact(density: float, total: int = TOTAL) -> int:
    return int(density * total + 0.5)


@pytest.fixture
def after(monkeypatch: pytest.MonkeyPatch) -> dict[int, State]:
    """The state after each number of optimizer steps, of the run trained last."""
    seen: dict[int, State] = {}
    end_step = Trainer._end_step

    def spy(self: Trainer, step, *rest):
        end_step(self, step, *rest)
        seen[step + 1] = {name: tensor.clone() for name, tensor in files.state_of(self.model).items()}

    monkeypatch.setattr(Trainer, "_end_step", spy)
    return seen


def same(left: State, right: State) -> bool:
    return all(torch.equal(tensor, right[name]) for name, tensor in left.items())


@pytest.mark.parametrize(
    ("step", "at", "densities"), [("2it", 2, [0.2, 0.2]), ("1ep", 4, [0.2, 0.2]), ("1ep3it", 7, [1.0, 0.2])]
)
def test_a_step_prunes_the_weights_of_the_dense_run(
    tmp_path: Path, after: dict[int, State], step: str, at: int, densities: list[float]
) -> None:
    run(config(tmp_path / "dense", **DENSE))
    dense = dict(after)
    after.clear()
    directory = run(config(tmp_path, **STEP, pruning__step=step))
    assert all(same(after[n], dense[n]) for n in range(1, at + 1))
    assert not same(after[at + 1], dense[at + 1])
    # The largest magnitudes of that moment, by sorting everything.
    mask = Masks.load(directory.level(0).mask)
    sizes = torch.cat([dense[at][name].abs().flatten() for name in mask])
    chosen = torch.zeros(TOTAL, dtype=torch.bool)
    chosen[sizes.argsort(descending=True)[: exact(0.2)]] = True
    assert torch.equal(torch.cat([bits.flatten() for bits in mask.values()]), chosen)
    assert all(after[at + 1][name][~bits].eq(0).all() for name, bits in mask.items())
    assert epochs(directory, "density") == [1.0 if density == 1.0 else exact(density) / TOTAL for density in densities]
    found = row(directory)
    assert (found["moment"], found["pruned_at_step"], found["rounds"]) == ("step", str(at), "1")
    assert (found["criterion"], found["kept_weights"], found["epochs"]) == ("magnitude", str(exact(0.2)), "2")
    assert Masks.load(directory.level(0).start_mask).kept == TOTAL


def test_each_density_is_pruned_at_the_step(tmp_path: Path) -> None:
    directory = run(config(tmp_path, pruning__moment="step", pruning__step="3it", levels__densities=[0.5, 1.0, 0.1]))
    found = rows(directory.levels_csv)
    assert [int(line["kept_weights"]) for line in found] == [exact(0.5), TOTAL, exact(0.1)]
    assert {line["rewind"] for line in found} == {""}


def test_rounds_of_a_pruning_in_mid_training_are_on_record(tmp_path: Path) -> None:
    keys = {"pruning__criterion": "snip", "pruning__samples_per_class": 1, "pruning__rounds": 3}
    directory = run(config(tmp_path, **STEP, **keys, pruning__step="3it", pruning__round_schedule="linear"))
    written = rows(directory.level(0).rounds)
    assert [float(line["requested"]) for line in written] == pytest.approx([1 - 0.8 / 3, 1 - 1.6 / 3, 0.2])
    assert [float(line["reached"]) for line in written] == [exact(float(line["requested"])) / TOTAL for line in written]
    assert row(directory)["rounds"] == "3"


@pytest.mark.parametrize(
    ("keys", "epoch"),
    [
        ({"early__trigger": "weight_distance", "early__threshold": 100.0}, 1),
        ({"early__trigger": "weight_distance_released", "early__threshold": 100.0}, 3),
        ({"early__trigger": "early_bird", "early__threshold": 1.1, "early__window": 1}, 2),
    ],
)
@pytest.mark.parametrize("length", ["published", "configured"])
def test_a_trigger_prunes_after_the_first_epoch_it_fires_in(
    tmp_path: Path, keys: dict, epoch: int, length: str
) -> None:
    keys = keys | ({} if length == "published" else {"early__latest": "3ep3it"})
    directory = run(config(tmp_path, **EARLY, **keys, early__length=length, training__epochs=4))
    count = epoch + 4 if length == "published" else 4
    found = row(directory)
    assert (found["moment"], found["pruned_at_step"], found["epochs"]) == ("early", str(4 * epoch), str(count))
    kept = exact(0.2) / TOTAL
    assert epochs(directory, "density") == [1.0] * (epoch - 1) + [kept] * (count - epoch + 1)
    assert epochs(directory, "step") == [4.0 * n for n in range(1, count + 1)]
    assert epochs(directory, "epoch") == list(range(count))
    distance = epochs(directory, "distance")
    blank = 1 if keys["early__trigger"] == "early_bird" else 0
    assert distance[:blank] == [None] * blank
    assert None not in distance[blank:]
    # The first epochs follow the schedule of four; what follows a published pruning begins it anew.
    lr = epochs(directory, "lr")
    whole = epochs(run(config(tmp_path / "dense", **DENSE, training__epochs=4)), "lr")
    assert lr[:epoch] == whole[:epoch]
    assert lr[epoch:] == pytest.approx(whole if length == "published" else whole[epoch:])


@pytest.mark.parametrize(
    ("length", "latest", "at"),
    [
        ("published", None, 8),
        *(
            (length, *case)
            for length in ("published", "configured")
            for case in (("3it", 3), ("1ep", 4), ("1ep1it", 5))
        ),
    ],
)
def test_a_trigger_that_never_fires_prunes_at_the_latest_step(
    tmp_path: Path, latest: str | None, at: int, length: str
) -> None:
    keys = {} if latest is None else {"early__latest": latest}
    directory = run(config(tmp_path, **EARLY, **keys, early__length=length, early__threshold=1e-12))
    found = row(directory)
    # After a pruning within an epoch the epoch is finished first.
    count = -(-at // 4) + 2 if length == "published" else 2
    assert (found["pruned_at_step"], found["epochs"]) == (str(at), str(count))
    assert int(found["kept_weights"]) == exact(0.2)
    assert None not in epochs(directory, "distance")


def test_the_distance_is_that_of_all_parameters_from_the_start(tmp_path: Path, after: dict[int, State]) -> None:
    directory = run(
        config(tmp_path, **EARLY, early__threshold=1e-12, early__latest="1ep3it", early__length="configured")
    )
    parameters = [n for n in after[4] if not n.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    start = run(config(tmp_path / "start", **DENSE, training__epochs=0))
    zero = files.load_weights(start.level(0).weights)
    norm = sum(zero[n].double().square().sum() for n in parameters).sqrt()
    curve = [
        float(sum((after[step][n].double() - zero[n].double()).square().sum() for n in parameters).sqrt() / norm)
        for step in (4, 8)
    ]
    assert epochs(directory, "distance") == pytest.approx(curve, rel=1e-6)


@pytest.mark.parametrize(
    "keys",
    [
        {**STEP, "pruning__step": "3it", "pruning__criterion": "taylor", "pruning__samples_per_class": 1},
        {**STEP, "pruning__step": "1ep", "training__ema": 0.9, "training__accumulation": 2, "training__clip": 0.5},
        {**EARLY, "early__threshold": 100.0, "pruning__criterion": "crop", "pruning__batches": 1, "pruning__rounds": 2},
    ],
)
def test_a_run_repeats_bit_for_bit_and_a_lost_row_comes_back(tmp_path: Path, keys: dict) -> None:
    first, second = run(config(tmp_path / "a", **keys)), run(config(tmp_path / "b", **keys))
    digests = [(row(d)["mask_digest"], row(d)["weights_digest"]) for d in (first, second)]
    assert digests[0] == digests[1]
    stamp = first.level(0).row.stat().st_mtime_ns
    run(config(tmp_path / "a", **keys))
    assert first.level(0).row.stat().st_mtime_ns == stamp
    before = row(first)
    first.level(0).row.unlink()
    run(config(tmp_path / "a", **keys))
    timing = ("seconds", "images_per_second")
    assert {k: v for k, v in row(first).items() if k not in timing} == {
        k: v for k, v in before.items() if k not in timing
    }


def test_an_average_never_holds_a_pruned_weight(tmp_path: Path) -> None:
    directory = run(config(tmp_path, **STEP, pruning__step="1ep2it", training__ema=0.99))
    mask = Masks.load(directory.level(0).mask)
    raw, average = (files.load_weights(p) for p in (directory.level(0).weights, directory.level(0).average))
    assert all(average[name][~bits].eq(0).all() for name, bits in mask.items())
    assert not torch.equal(raw["conv1.weight"], average["conv1.weight"])


def test_a_pruning_in_mid_training_starts_from_a_mask_file(tmp_path: Path) -> None:
    still = run(config(tmp_path / "half", pruning__moment="init", pruning__density=0.5, training__epochs=0))
    mask = still.level(0).mask
    directory = run(config(tmp_path, **STEP, pruning__step="1ep", pruning__mask_file=str(mask)))
    begin, end = Masks.load(directory.level(0).start_mask), Masks.load(directory.level(0).mask)
    assert begin.digest == Masks.load(mask).digest
    assert end <= begin
    assert end.kept == exact(0.2)


def test_a_mask_that_cuts_the_network_stops_training_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no path is left from input to output") as caught:
        run(config(tmp_path, pruning__moment="step", pruning__step="2it", pruning__density=0.0001))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({**STEP, "pruning__step": "9it"}, r"pruning\.step=9it: training has only 8 steps"),
        ({**EARLY, "early__latest": "9it"}, r"early\.latest=9it: training has only 8 steps"),
        ({**EARLY, "training__epochs": 0}, r"pruning\.moment=early"),
        ({**STEP, "pruning__step": "1it", "training__epochs": 0}, r"pruning\.step=1it"),
        (
            {
                **EARLY,
                "early__trigger": "early_bird",
                "model__name": "torchvision/squeezenet1_1",
                "data__image_size": 64,
            },
            r"early\.trigger=early_bird: the model has no BatchNorm",
        ),
    ],
)
def test_a_moment_that_cannot_come_is_refused_before_anything_is_written(
    tmp_path: Path, keys: dict, message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        run(config(tmp_path / "runs", **keys))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()
