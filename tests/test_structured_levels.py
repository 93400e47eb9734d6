"""Structured runs end to end, in one process on real digits: plans, gates, widths, records, resuming."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
import torch

from tests.levels_cases import config, everything, rows
from tests.test_levels_resume import Stops
from utils import files, models
from utils.models.widths import WidthFile
from utils.params import Params
from utils.params.plan import level_plan
from utils.pruning.structured import Channels
from utils.pruning.structured.cost import counted_macs
from utils.reporting.verify import verify
from utils.structured_levels import StructuredDriver
from utils.system.console import Console
from utils.system.distributed import World
from utils.system.errors import Preempted, UserError
from utils.system.rundir import RunDir
from utils.system.stopping import Never

SHAPE = (3, 16, 16)


def run(params: Params, stopping: Never | None = None) -> RunDir:
    return StructuredDriver(params, World(), torch.device("cpu"), Console(main=False), stopping).run()


def structured(root: Path, epochs: int = 1, **keys: object) -> Params:
    base = {"structured__budget": "macs", "structured__keep": [0.5], "pruning__moment": "init"}
    return config(root, epochs, **{**base, **keys})


SCRATCH = {
    "structured__criterion": "gates",
    "structured__coupled": False,
    "structured__fresh": True,
    "structured__gate_epochs": 2,
    "structured__gate_lr": 0.1,
    "structured__keep": [0.7, 0.5],
}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> tuple[Params, RunDir]:
    params = structured(tmp_path_factory.mktemp("scratch"), **SCRATCH)
    return params, run(params)


def test_pruning_from_scratch_runs_all_stages_as_levels(scratch: tuple[Params, RunDir]) -> None:
    directory = scratch[1]
    table = rows(directory.levels_csv)
    assert [row["level"] for row in table] == ["0", "1", "2"]
    gates = files.load_tensors(directory.level(0).gates)[0]
    assert sum(len(gate) for gate in gates.values()) == 3 * (16 + 32 + 64)
    assert any(float(gate.min()) < 0.9 for gate in gates.values())
    epochs = rows(directory.level(0).epochs)
    assert float(epochs[1]["gates_mean"]) < float(epochs[0]["gates_mean"]) < 1.0
    dense = int(table[0]["macs_dense"])
    assert [int(row["macs"]) for row in table[:1]] == [dense]
    for row, keep in zip(table[1:], (0.7, 0.5), strict=True):
        assert keep - 0.011 < int(row["macs"]) / dense <= keep  # a channel is up to 1.1 % of this network's MACs
        assert float(row["kept_share"]) == int(row["macs"]) / dense
        assert (row["criterion"], row["allocation"], row["pattern"]) == ("gates", "global", "channels removed")
    assert json.loads(directory.status.read_text())["state"] == "done"


def test_what_the_csv_says_is_what_the_rebuilt_network_has(scratch: tuple[Params, RunDir]) -> None:
    directory = scratch[1]
    for row in rows(directory.levels_csv)[1:]:
        place = directory.level(int(row["level"]))
        network = models.rebuild(place.widths, place.weights)
        assert counted_macs(network, SHAPE) == int(row["macs"])
        assert sum(p.numel() for p in network.parameters()) == int(row["parameters"])
        assert files.digest(files.state_of(network)) == row["weights_digest"]
        prunable = sum(p.numel() for p in network.parameters() if p.dim() > 1)
        assert (int(row["kept_weights"]), float(row["density"])) == (prunable, prunable / int(row["prunable_weights"]))
        for column in ("peak_memory_mb", "train_seconds_per_image", "seconds_per_image"):
            assert float(row[column]) > 0.0
        layers = {layer["name"]: layer for layer in rows(place.layers)}
        assert int(layers["layer1.0.conv1.weight"]["width"]) == network.layer1[0].conv1.out_channels
        assert int(layers["fc.weight"]["width"]) == 10


def test_widths_follow_the_gates(scratch: tuple[Params, RunDir]) -> None:
    directory = scratch[1]
    gates = files.load_tensors(directory.level(0).gates)[0]
    channels = WidthFile.load(directory.level(2).widths).facts["channels"]
    kept = torch.cat([gate[channels[name]] for name, gate in gates.items()])
    lost = torch.cat([gate[[u for u in range(len(gate)) if u not in channels[name]]] for name, gate in gates.items()])
    narrowest = [name for name, gate in gates.items() if len(channels[name]) == 1]
    assert float(kept.min()) >= float(lost.max()) or narrowest


def test_weights_start_fresh_for_the_smaller_network(scratch: tuple[Params, RunDir], tmp_path: Path) -> None:
    """With no training the level's weights are those its constructor draws."""
    params = structured(tmp_path, 0, structured__criterion="random", structured__fresh=True)
    place = run(params).level(0)
    drawn = models.rebuild(place.widths)
    assert files.digest(files.state_of(drawn)) == files.digest(files.load_weights(place.weights))
    sliced = run(structured(tmp_path, 0, structured__criterion="random")).level(0)
    stock = models.build("cifar/resnet20", 10, image_size=16)
    units = WidthFile.load(sliced.widths).facts["channels"]["layer2.1.conv1"]
    kept = stock.layer2[1].conv1.weight[units]
    inputs = WidthFile.load(sliced.widths).facts["channels"]["layer2.0.conv2"]
    found = files.load_weights(sliced.weights)["layer2.1.conv1.weight"]
    assert torch.equal(found, kept[:, inputs])


def test_a_rerun_skips_what_is_done_and_repeats_what_is_missing(scratch: tuple[Params, RunDir]) -> None:
    params, directory = scratch
    before = {path: path.stat().st_mtime_ns for path in directory.path.rglob("*.safetensors")}
    first = rows(directory.levels_csv)
    run(params)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    directory.level(2).row.unlink()
    run(params)
    again = rows(directory.levels_csv)
    for column in ("mask_digest", "weights_digest", "macs", "final_test_acc"):
        assert [row[column] for row in again] == [row[column] for row in first]


def test_one_shot_fine_tunes_the_trained_weights(tmp_path: Path) -> None:
    directory = run(structured(tmp_path, 1, pruning__moment="oneshot", structured__keep=[0.6, 0.4]))
    table = rows(directory.levels_csv)
    assert [row["rewind"] for row in table] == ["", "lrr", "lrr"]
    assert [row["pruned_test_acc"] == "" for row in table] == [True, False, False]
    assert float(table[0]["density"]) == 1.0
    found = [WidthFile.load(directory.level(n).widths).facts["channels"] for n in (1, 2)]
    # Both come from level 0's scores, so the narrower keeps a part of the wider.
    assert all(set(found[1][name]) <= set(found[0][name]) for name in found[0])


def test_iterative_pruning_only_removes_and_records_channels_of_the_first_network(tmp_path: Path) -> None:
    keys = {"pruning__moment": "levels", "structured__keep": [0.7, 0.5], "structured__budget": "parameters"}
    directory = run(structured(tmp_path, 1, **keys))
    one, two = (WidthFile.load(directory.level(n).widths).facts for n in (1, 2))
    assert all(set(two["channels"][name]) <= set(one["channels"][name]) for name in one["channels"])
    assert two["widths"] == {name: len(units) for name, units in two["channels"].items()}
    network = models.rebuild(directory.level(2).widths, directory.level(2).weights)
    total = sum(p.numel() for p in models.build("cifar/resnet20", 10).parameters())
    assert sum(p.numel() for p in network.parameters()) == two["reached"] <= 0.5 * total


def test_early_pruning_ends_level_0_when_the_trigger_fires(tmp_path: Path) -> None:
    keys = {"pruning__moment": "early", "early__threshold": 1e9, "structured__criterion": "crop", "pruning__batches": 2}
    table = rows(run(structured(tmp_path, 4, pruning__batch_size=20, **keys)).levels_csv)
    # The distance is first known after the second epoch at the latest.
    assert [int(row["epochs"]) for row in table] == [1, 4] or [int(row["epochs"]) for row in table] == [2, 4]
    keys["pruning__batch_size"] = 20
    late = rows(run(structured(tmp_path, 4, **{**keys, "early__threshold": 1e-9, "early__latest": "3ep"})).levels_csv)
    assert [int(row["epochs"]) for row in late] == [3, 4]


def test_rounds_score_again_what_is_left(tmp_path: Path) -> None:
    keys = {"structured__criterion": "snap", "pruning__batches": 2, "pruning__batch_size": 20}
    one, three = (run(structured(tmp_path, 0, structured__rounds=n, **keys)) for n in (1, 3))
    first, again = (WidthFile.load(found.level(0).widths).facts for found in (one, three))
    assert again["reached"] <= again["allowed"] == first["allowed"]
    assert first["channels"] != again["channels"]


def test_a_wider_network_is_pruned_to_a_share_of_the_stock_one(tmp_path: Path) -> None:
    keys = {"structured__expansion": 20, "structured__multiplier": 1.25, "structured__criterion": "random"}
    row = rows(run(structured(tmp_path, 0, structured__fresh=True, structured__coupled=False, **keys)).levels_csv)[0]
    stock = Channels.of(models.build("cifar/resnet20", 10), SHAPE).cost.macs()
    assert int(row["macs_dense"]) == stock
    assert 0.48 < int(row["macs"]) / stock <= 0.5


def test_scratch_b_trains_as_many_macs() -> None:
    params = structured(Path("r"), 160, structured__scratch="b", structured__keep=[0.5, 0.3])
    assert [level.epochs for level in level_plan(params)] == [320, 533]
    params = structured(Path("r"), 160, structured__scratch="e", structured__keep=[0.5, 0.3], **{
        key: value for key, value in SCRATCH.items() if key != "structured__keep"
    })  # fmt: skip
    assert [(level.epochs, level.source) for level in level_plan(params)] == [(2, None), (160, 0), (160, 0)]


def test_scratch_b_stretches_the_schedule_with_its_milestones(tmp_path: Path) -> None:
    """Half of the MACs: twice the epochs, and the rate falls after twice the steps."""
    keys = {"schedule__name": "step", "schedule__milestones": ["2ep", "3ep"], "schedule__gamma": 0.1}
    params = structured(tmp_path, 4, structured__scratch="b", structured__fresh=True, optimizer__lr=1.0, **keys)
    directory = run(params)
    found = [(int(row["epoch"]), float(row["lr"])) for row in rows(directory.level(0).epochs)]
    assert [epoch for epoch, _ in found] == list(range(8))
    assert [rate for _, rate in found] == pytest.approx([1.0] * 4 + [0.1] * 2 + [0.01] * 2)
    assert int(rows(directory.levels_csv)[0]["epochs"]) == 8


def test_a_network_that_cannot_be_pruned_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    params = structured(tmp_path, model__name="torchvision/shufflenet_v2_x0_5", data__image_size=64)
    with pytest.raises(UserError, match=r"structured pruning of torchvision/shufflenet_v2_x0_5: its channels cannot"):
        run(params)
    assert not list(tmp_path.iterdir())


HALF = {"structured.budget": "macs", "structured.keep": [0.5]}
TICKTOCK = {**HALF, "structured.criterion": "gates", "pruning.moment": "ticktock"}

WRONG: list[tuple[dict[str, object], str]] = [
    ({"structured.budget": "macs"}, "structured.keep: not set"),
    ({"structured.keep": [0.5]}, "structured.keep=0.5: has no effect with structured.budget=none"),
    ({**HALF, "pruning.density": 0.0}, "pruning.density=0: leaves no weight in what is left of the network"),
    ({**HALF, "pruning.criterion": "snip"}, "pruning.criterion=snip: has no effect with structured.budget=macs"),
    ({**HALF, "pruning.density": 0.5, "pruning.control": "shuffle"}, "pruning.control=shuffle: has no effect"),
    ({**HALF, "recipe.soft.kind": "swish"}, "recipe.soft.kind=swish: has no effect with structured.budget=macs"),
    ({**HALF, "structured.criterion": "gates"}, "set pruning.moment=init or ticktock"),
    ({**HALF, "pruning.moment": "ticktock"}, "set structured.criterion=gates"),
    ({"pruning.moment": "ticktock", "pruning.density": 0.5}, "pruning.moment=ticktock: takes channels out"),
    ({**TICKTOCK, "structured.gate_target": 0.5}, "gate_target=0.5: has no effect with pruning.moment=ticktock"),
    ({**TICKTOCK, "structured.fresh": True}, "structured.fresh=true: contradicts pruning.moment=ticktock"),
    ({**TICKTOCK, "pruning.density": 0.5}, "pruning.density=0.5: contradicts pruning.moment=ticktock"),
    ({**TICKTOCK, "structured.keep": [0.3, 0.5]}, "list falling shares"),
    ({**TICKTOCK, "pruning.moment": "init", "structured.tock_epochs": 3}, "tock_epochs=3: has no effect"),
    ({**HALF, "structured.budget": "channels", "structured.scratch": "b"}, "set structured.budget=macs"),
    ({**HALF, "structured.gate_lr": 0.1}, "without structured.criterion=gates"),
    ({**HALF, "structured.keep": [0.3, 0.5]}, "list falling shares"),
    ({**HALF, "levels.rewind": "imp"}, "structured.fresh=true"),
]


@pytest.mark.parametrize(("keys", "message"), WRONG)
def test_contradictions_are_refused_in_one_line(keys: dict[str, object], message: str) -> None:
    from utils.params.load import build

    with pytest.raises(UserError) as caught:
        build(keys)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


EARLY = {
    "structured__criterion": "snap",
    "pruning__moment": "early",
    "pruning__samples_per_class": 1,
    "early__trigger": "weight_distance",
    "early__latest": "1ep",
}


TURNS = {
    "structured__criterion": "gates",
    "pruning__moment": "ticktock",
    "structured__gate_epochs": 1,
    "structured__tock_epochs": 1,
}
THEN = {"pruning__moment": "oneshot", "pruning__density": 0.5, "training__ema": 0.9}
RESUMED = {"scratch": SCRATCH, "early": EARLY, "ticktock": TURNS, "then single weights": THEN}


@pytest.mark.parametrize("name", [*list(RESUMED)[:3], pytest.param("then single weights", marks=pytest.mark.slow)])
def test_stopped_again_and_again_it_leaves_the_bits_of_the_whole_run(name: str, tmp_path: Path) -> None:
    keys = {"training__eval_batch_size": 1000, "data__subset": 120, **RESUMED[name]}
    whole = run(structured(tmp_path / "whole", 2, **keys))
    assert verify(whole) == []
    params = structured(tmp_path / "stopped", 2, **keys)
    stops = 0
    while stops < 60:
        with contextlib.suppress(Preempted):
            stopped = run(params, Stops(4))
            break
        stops += 1
    assert 2 <= stops < 60
    timed = {"peak_memory_mb", "train_seconds_per_image", "seconds_per_image"}
    own, other = everything(stopped), everything(whole)
    for found in (own, other):
        found["levels.csv"] = [{k: v for k, v in row.items() if k not in timed} for row in found["levels.csv"]]
    assert own == other
