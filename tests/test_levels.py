"""The level driver end to end, in one process on real digits: plans, rewinds, records, resuming."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from utils import files, levels
from utils.masks import Masks
from utils.params import Params
from utils.params.load import build
from utils.reporting import COLUMNS
from utils.system.console import Console
from utils.system.distributed import World
from utils.system.errors import UserError
from utils.system.rundir import RunDir

TIMING = {column.name for column in COLUMNS if column.timing}


def config(root: Path, **keys: object) -> Params:
    base = {
        "run.root": str(root),
        "data.name": "digits",
        "data.loader": "device",
        "data.subset": 160,
        "data.val": 0.1,
        "model.name": "cifar/resnet20",
        "training.epochs": 1,
        "training.batch_size": 40,
        "training.precision": "float32",
        "optimizer.lr": 0.05,
        "schedule.name": "triangular",
        "levels.densities": [0.5, 0.2],
    }
    return build({**base, **{key.replace("__", "."): value for key, value in keys.items()}})


def run(params: Params) -> RunDir:
    return levels.Driver(params, World(), torch.device("cpu"), Console(main=False)).run()


def rows(directory: RunDir, path: Path | None = None) -> list[dict[str, str]]:
    with open(path or directory.levels_csv, encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def comparable(directory: RunDir) -> list[dict[str, str]]:
    return [{k: v for k, v in row.items() if k not in TIMING} for row in rows(directory)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> RunDir:
    return run(config(tmp_path_factory.mktemp("lrr")))


def test_every_level_leaves_a_row_with_exact_counts(finished: RunDir) -> None:
    table = rows(finished)
    assert [row["level"] for row in table] == ["0", "1", "2"]
    total = int(table[0]["prunable_weights"])
    assert [int(row["kept_weights"]) for row in table] == [total, int(0.5 * total + 0.5), int(0.2 * total + 0.5)]
    for row in table:
        assert float(row["density"]) == int(row["kept_weights"]) / total
        assert float(row["sparsity"]) == 1.0 - float(row["density"])
        assert 0.0 <= float(row["final_test_acc"]) <= float(row["max_test_acc"]) <= 100.0
    assert table[0]["pruned_test_acc"] == ""
    assert table[1]["pruned_test_acc"] != ""
    assert json.loads(finished.status.read_text())["state"] == "done"


def test_masks_are_subsets_and_saved_weights_lie_inside_them(finished: RunDir) -> None:
    masks = [Masks.load(finished.level(n).mask) for n in range(3)]
    assert masks[2] <= masks[1] <= masks[0]
    for number, mask in enumerate(masks):
        weights = files.load_weights(finished.level(number).weights)
        for name, bits in mask.items():
            assert weights[name][~bits].eq(0).all()
            assert not torch.signbit(weights[name][~bits]).any()
            assert weights[name][bits].ne(0).float().mean() > 0.99
        assert rows(finished)[number]["mask_digest"] == mask.digest


def test_files_of_a_level(finished: RunDir) -> None:
    level = finished.level(1)
    layers = rows(finished, level.layers)
    assert sum(int(row["kept"]) for row in layers if row["prunable"] == "True") == int(
        rows(finished)[1]["kept_weights"]
    )
    epochs = rows(finished, level.epochs)
    assert [row["epoch"] for row in epochs] == ["0"]
    assert float(epochs[0]["test_acc"]) == float(rows(finished)[1]["final_test_acc"])
    assert 0.0 <= float(epochs[0]["data_wait"]) <= 1.0


def test_same_config_twice_gives_the_same_bits(finished: RunDir, tmp_path: Path) -> None:
    again = run(config(tmp_path))
    assert again.path.name == finished.path.name
    assert comparable(again) == comparable(finished)


def test_config_passed_back_names_the_same_run(finished: RunDir) -> None:
    import harness_params
    from utils.params.identity import run_id

    assert run_id(harness_params.load(["--config", str(finished.config)])) == finished.path.name


def test_level_by_level_is_the_whole_run(finished: RunDir, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"levels\.only=1: level 0 it starts from is not done"):
        run(config(tmp_path, levels__only=1))
    for number in range(3):
        directory = run(config(tmp_path, levels__only=number))
    assert comparable(directory) == comparable(finished)
    assert directory.config.read_text().replace(str(tmp_path), "") == finished.config.read_text().replace(
        str(finished.path.parent), ""
    )


def test_a_run_broken_in_mid_level_ends_with_the_same_bits(finished: RunDir, tmp_path: Path, monkeypatch) -> None:
    real, calls = levels.EpochsCsv.write, []

    def broken(self: levels.EpochsCsv, row: dict) -> None:
        real(self, row)
        calls.append(row)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(levels.EpochsCsv, "write", broken)
    with pytest.raises(KeyboardInterrupt):
        run(config(tmp_path))
    assert len(calls) == 2
    directory = RunDir(next(tmp_path.iterdir()))
    assert [row["level"] for row in rows(directory)] == ["0"]
    assert directory.level(1).mask.exists()
    assert not directory.level(1).row.exists()
    run(config(tmp_path))
    assert comparable(directory) == comparable(finished)


def test_imp_returns_to_the_initial_weights(tmp_path: Path) -> None:
    directory = run(config(tmp_path, levels__rewind="imp", levels__epochs=[1, 0, 0], run__seed=3))
    initial = run(config(tmp_path / "i", levels__epochs=[0, 0, 0], run__seed=3, levels__rewind="imp"))
    start = files.load_weights(initial.level(0).weights)
    trained = files.load_weights(directory.level(0).weights)
    for number in (1, 2):
        mask, stored = Masks.load(directory.level(number).mask), files.load_weights(directory.level(number).weights)
        for name, tensor in stored.items():
            expected = start[name].masked_fill(~mask[name], 0.0) if name in mask else start[name]
            assert torch.equal(tensor, expected), name
    assert not torch.equal(trained["conv1.weight"], start["conv1.weight"])
    # The mask is that of the trained weights' magnitudes, found here by sorting.
    mask = Masks.load(directory.level(1).mask)
    flat = torch.cat([trained[name].abs().flatten() for name in mask])
    kept = torch.cat([mask[name].flatten() for name in mask])
    assert flat[kept].min() >= flat[~kept].max()


def test_wr_returns_to_the_rewind_step_and_continues_its_schedule(tmp_path: Path) -> None:
    keys = {"levels__densities": [0.5], "schedule__name": "cosine"}
    long = run(config(tmp_path, levels__rewind="wr", levels__rewind_step="1ep", levels__epochs=[2, 2], **keys))
    rewind, metadata = files.load_tensors(long.level(0).rewind)
    assert metadata["step"] == "4"  # 160 images in batches of 40
    epochs = rows(long, long.level(1).epochs)
    assert [row["epoch"] for row in epochs] == ["1"]
    assert epochs[0]["lr"] == rows(long, long.level(0).epochs)[1]["lr"]
    assert rows(long)[1]["epochs"] == "1"
    still = run(
        config(
            tmp_path / "s",
            levels__rewind="wr",
            levels__rewind_step="1ep",
            levels__epochs=[2, 2],
            levels__rewind_schedule="restart",
            training__eval_every=2,
            **keys,
        )
    )
    again, _ = files.load_tensors(still.level(0).rewind)
    for name, tensor in rewind.items():
        assert torch.equal(tensor, again[name])
    assert rows(still, still.level(1).epochs)[0]["lr"] == rows(still, still.level(0).epochs)[0]["lr"]


def test_the_rewind_point_holds_the_weights_of_that_step(tmp_path: Path) -> None:
    keys = {"schedule__name": "constant", "levels__densities": [0.5]}
    long = run(config(tmp_path, levels__rewind="wr", levels__rewind_step="1ep", levels__epochs=[2, 2], **keys))
    short = run(config(tmp_path / "short", levels__only=0, levels__epochs=[1, 1], **keys))
    rewind, _ = files.load_tensors(long.level(0).rewind)
    for name, tensor in files.load_weights(short.level(0).weights).items():
        assert torch.equal(rewind[f"model.{name}"], tensor), name
    assert any(name.startswith("optimizer.") for name in rewind)


def test_rewind_none_fine_tunes_at_the_final_rate(tmp_path: Path) -> None:
    directory = run(config(tmp_path, levels__rewind="none", levels__densities=[0.5], training__epochs=2))
    rates = [row["lr"] for row in rows(directory, directory.level(1).epochs)]
    assert len(set(rates)) == 1
    assert 0.0 < float(rates[0]) < 0.05
    given = run(config(tmp_path, levels__rewind="none", levels__densities=[0.5], levels__finetune_lr=0.003))
    assert float(rows(given, given.level(1).epochs)[0]["lr"]) == 0.003


def test_pruning_at_initialisation_takes_densities_in_any_order(tmp_path: Path) -> None:
    keys = {
        "pruning__moment": "init",
        "pruning__criterion": "random",
        "pruning__allocation": "erk",
        "training__epochs": 0,
    }
    up = run(config(tmp_path / "up", levels__densities=[0.1, 0.6], **keys))
    down = run(config(tmp_path / "down", levels__densities=[0.6, 0.1], **keys))
    digests = {row["target_density"]: row["weights_digest"] for row in rows(up)}
    assert digests == {row["target_density"]: row["weights_digest"] for row in rows(down)}
    assert [row["rewind"] for row in rows(up)] == ["", ""]


def test_one_shot_levels_all_start_from_the_dense_one(tmp_path: Path) -> None:
    both = run(config(tmp_path / "b", pruning__moment="oneshot", levels__densities=[0.5, 0.2]))
    one = run(config(tmp_path / "o", pruning__moment="oneshot", levels__densities=[0.2]))
    assert rows(both)[2]["mask_digest"] == rows(one)[1]["mask_digest"]
    assert rows(both)[2]["density"] == rows(one)[1]["density"]


def test_a_geometric_run_can_be_extended(tmp_path: Path) -> None:
    keys = {"levels__densities": [], "levels__rate": 0.5, "training__epochs": 0}
    first = run(config(tmp_path, levels__count=2, **keys))
    second = run(config(tmp_path, levels__count=4, **keys))
    assert first.path == second.path
    total = int(rows(second)[0]["prunable_weights"])
    assert [int(row["kept_weights"]) for row in rows(second)] == [int(0.5**k * total + 0.5) for k in range(4)]


def test_changed_inputs_stop_the_run_and_are_named(finished: RunDir, tmp_path: Path, monkeypatch) -> None:
    run(config(tmp_path, levels__only=0))
    environment = RunDir(next(tmp_path.iterdir())).environment
    record = json.loads(environment.read_text())
    record["inputs"]["data train"] = "0" * 64
    environment.write_text(json.dumps(record))
    with pytest.raises(UserError, match="data train was 0000000000000000 when this run began"):
        run(config(tmp_path))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model__name": "timm/resnet1"}, "resnet1"),
        ({"training__batch_size": 4000}, r"training\.batch_size"),
        ({"pruning__exclude": ["nothing*"]}, r"pruning\.exclude: 'nothing\*'"),
        ({"levels__only": 7}, r"levels\.only=7: the plan has levels 0 to 2"),
        ({"levels__rewind": "wr", "levels__rewind_step": "50it"}, r"levels\.rewind_step=50it"),
        ({"data__subset": 100000}, r"data\.subset"),
        ({"model__pretrained": "absent.safetensors"}, r"absent\.safetensors"),
        ({"schedule__warmup": "9ep"}, r"schedule\.warmup"),
        ({"distributed__sync_batchnorm": True}, r"distributed\.sync_batchnorm=true needs GPUs"),
    ],
)
def test_wrong_input_is_one_line_and_writes_nothing(tmp_path: Path, keys: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        run(config(tmp_path / "runs", **keys))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_a_loss_that_is_not_finite_stops_the_level(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"level 0, step \d+, rank 0: the loss became (nan|inf).*optimizer\.lr"):
        run(config(tmp_path, optimizer__lr=1e30, training__check_every=1))


def test_average_is_evaluated_and_saved_beside_the_raw_weights(tmp_path: Path) -> None:
    directory = run(config(tmp_path, training__ema=0.9, levels__densities=[0.5]))
    mask = Masks.load(directory.level(1).mask)
    raw, average = (files.load_weights(p) for p in (directory.level(1).weights, directory.level(1).average))
    assert all(average[name][~bits].eq(0).all() for name, bits in mask.items())
    assert not torch.equal(raw["conv1.weight"], average["conv1.weight"])
    assert rows(directory)[1]["weights_digest"] == files.digest(raw)


def test_accumulation_clipping_mixing_and_flip_together(tmp_path: Path) -> None:
    directory = run(
        config(
            tmp_path,
            training__accumulation=2,
            training__clip=1.0,
            data__mixup=0.2,
            data__cutmix=1.0,
            training__test_flip=True,
            training__label_smoothing=0.1,
            optimizer__name="adamw",
            optimizer__lr=0.001,
            optimizer__decay_norms_and_biases=False,
            levels__densities=[0.3],
        )
    )
    assert len(rows(directory)) == 2


def test_no_val_split_leaves_the_column_empty(tmp_path: Path) -> None:
    directory = run(config(tmp_path, data__val=0.0, levels__densities=[0.5]))
    assert {row["val_acc"] for row in rows(directory)} == {""}
    assert {row["best_val_test_acc"] for row in rows(directory)} == {""}
