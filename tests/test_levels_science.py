"""What each level starts from, prunes and reports, checked on weights seen at the moment training begins."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from utils import data, files, levels, models, pruning
from utils.data.order import Shard
from utils.masks import Masks, prunable_parameters
from utils.params import Params, parsing
from utils.params.load import build
from utils.pruning.criteria import criterion
from utils.system.console import Console
from utils.system.distributed import World
from utils.system.registry import Entry, declared
from utils.system.rundir import RunDir
from utils.training.trainer import Trainer


def config(root: Path, **keys: object) -> Params:
    base = {
        "run.root": str(root),
        "data.name": "digits",
        "data.loader": "device",
        "data.subset": 160,
        "model.name": "cifar/resnet20",
        "training.epochs": 1,
        "training.batch_size": 40,
        "training.precision": "float32",
        "optimizer.lr": 0.05,
        "levels.densities": [0.5, 0.2],
    }
    return build({**base, **{key.replace("__", "."): value for key, value in keys.items()}})


def run(params: Params) -> RunDir:
    return levels.Driver(params, World(), torch.device("cpu"), Console(main=False)).run()


def rows(directory: RunDir) -> list[dict[str, str]]:
    with open(directory.levels_csv, encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


@pytest.fixture
def starts(monkeypatch) -> dict[int, dict[str, Any]]:
    """By level: the state, the momentum and the step that training began with."""
    seen: dict[int, dict[str, Any]] = {}
    fit = Trainer.fit

    def spy(self: Trainer, stage, optimizer, *rest):
        named = {p: name for name, p in self.model.named_parameters()}
        momentum = {
            named[p]: s["momentum_buffer"].clone() for p, s in optimizer.state.items() if "momentum_buffer" in s
        }
        state = {name: t.clone() for name, t in files.state_of(self.model).items()}
        seen[stage.level] = {"state": state, "momentum": momentum, "step": stage.start}
        return fit(self, stage, optimizer, *rest)

    monkeypatch.setattr(Trainer, "fit", spy)
    return seen


def inside(state: dict[str, torch.Tensor], mask: Masks) -> dict[str, torch.Tensor]:
    return {name: t.masked_fill(~mask[name], 0.0) if name in mask else t for name, t in state.items()}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def largest(state: dict[str, torch.Tensor], live: Masks, density: float) -> dict[str, torch.Tensor]:
    """The mask of the largest live magnitudes, by sorting everything."""
    magnitudes = torch.cat([state[name].abs().masked_fill(~live[name], -1.0).flatten() for name in live])
    keep = int(density * live.total + 0.5)
    kept = torch.zeros_like(magnitudes, dtype=torch.bool)
    kept[magnitudes.argsort(descending=True)[:keep]] = True
    parts = kept.split([live[name].numel() for name in live])
    return {name: part.view_as(live[name]) for name, part in zip(live, parts, strict=True)}


def test_lrr_goes_on_from_the_pruned_level_statistics_included(tmp_path: Path, starts) -> None:
    directory = run(config(tmp_path))
    live = Masks.load(directory.level(0).mask)
    for number, density in ((1, 0.5), (2, 0.2)):
        before = files.load_weights(directory.level(number - 1).weights)
        mask = Masks.load(directory.level(number).mask)
        assert_same(dict(mask), largest(before, live, density))
        assert_same(starts[number]["state"], inside(before, mask))
        assert starts[number]["momentum"] == {}
        live = mask


@pytest.mark.parametrize("restore", [True, False])
def test_wr_starts_from_the_rewind_file_in_mid_epoch(tmp_path: Path, starts, restore: bool) -> None:
    keys = {"levels__rewind": "wr", "levels__rewind_step": "1ep2it", "training__epochs": 2}
    directory = run(config(tmp_path, levels__rewind_optimizer=restore, **keys))
    stored, metadata = files.load_tensors(directory.level(0).rewind)
    assert metadata["step"] == "6"
    state = {name.removeprefix("model."): t for name, t in stored.items() if name.startswith("model.")}
    for number in (1, 2):
        mask = Masks.load(directory.level(number).mask)
        assert_same(starts[number]["state"], inside(state, mask))
        assert starts[number]["step"] == 6
        momentum = starts[number]["momentum"]
        assert bool(momentum) is restore
        for name, tensor in momentum.items():
            expected = stored[f"optimizer.{name}.momentum_buffer"]
            assert torch.equal(tensor, expected.masked_fill(~mask[name], 0.0) if name in mask else expected), name
    with open(directory.level(1).epochs, encoding="utf-8") as handle:
        assert [row["step"] for row in csv.DictReader(handle)] == ["8"]


def test_accuracy_after_pruning_is_that_of_the_masked_weights(tmp_path: Path) -> None:
    table = rows(run(config(tmp_path, training__epochs=2, levels__epochs=[2, 0, 0])))
    assert [row["pruned_test_acc"] for row in table[1:]] == [row["final_test_acc"] for row in table[1:]]


def test_final_accuracy_with_an_average_is_the_averages(tmp_path: Path) -> None:
    params = config(tmp_path, training__ema=0.97, training__epochs=2, levels__densities=[0.5])
    directory = run(params)
    loaders = data.build(params, Shard(batch_size=40), torch.device("cpu"), False, 1)
    found = {}
    for kind, path in (("average", directory.level(1).average), ("raw", directory.level(1).weights)):
        model = models.build("cifar/resnet20", 10)
        model.load_state_dict(files.load_weights(path))
        model.eval()
        with torch.no_grad():
            logits, labels = (torch.cat(part) for part in zip(*((model(x), y) for x, y in loaders.test), strict=True))
        found[kind] = F.cross_entropy(logits, labels).item()
    assert float(rows(directory)[1]["test_loss"]) == pytest.approx(found["average"], rel=1e-4)
    assert found["average"] != pytest.approx(found["raw"], rel=1e-3)


def test_scores_see_gradients_that_no_earlier_level_masks(tmp_path: Path, monkeypatch) -> None:
    def gradient_scores(self, model, masks, batches=()):
        model.zero_grad()
        model.eval()(torch.ones(1, 3, 16, 16)).sum().backward()
        scores = {n: (p.detach() * p.grad).abs() for n, p in prunable_parameters(model).items()}
        model.zero_grad()
        model.train()
        return scores

    monkeypatch.setattr(pruning.PruningHarness, "score", gradient_scores)
    keys = {"pruning__moment": "oneshot", "levels__densities": [0.2, 0.5]}
    whole = run(config(tmp_path / "whole", **keys))
    for number in range(3):
        parts = run(config(tmp_path / "parts", levels__only=number, **keys))
    assert [row["mask_digest"] for row in rows(whole)] == [row["mask_digest"] for row in rows(parts)]


def test_iterative_levels_only_remove_whatever_the_scores(tmp_path: Path, monkeypatch) -> None:
    def fickle(self, model, masks, batches=()):
        return {n: torch.rand(p.shape) for n, p in prunable_parameters(model).items()}

    monkeypatch.setattr(pruning.PruningHarness, "score", fickle)
    directory = run(config(tmp_path, training__epochs=0))
    masks = [Masks.load(directory.level(n).mask) for n in range(3)]
    assert masks[2] <= masks[1] <= masks[0]


def test_a_level_made_from_other_weights_is_made_again(tmp_path: Path) -> None:
    directory = run(config(tmp_path))
    before = rows(directory)
    whole = directory.level(0).weights.read_bytes()
    # Level 0 is run again after its row is lost; its weights come back bit by bit, so nothing else is.
    directory.level(0).row.unlink()
    stamps = [directory.level(n).row.stat().st_mtime_ns for n in (1, 2)]
    run(config(tmp_path))
    assert [directory.level(n).row.stat().st_mtime_ns for n in (1, 2)] == stamps
    # A level whose row is lost beside other weights of level 0 does not take its old mask.
    state = files.load_weights(directory.level(0).weights)
    files.save_weights(directory.level(0).weights, {n: t.flip(0) if t.dim() == 4 else t for n, t in state.items()})
    directory.level(1).row.unlink()
    run(config(tmp_path))
    assert rows(directory)[1]["mask_digest"] != before[1]["mask_digest"]
    directory.level(0).weights.write_bytes(whole)
    directory.level(1).row.unlink()
    run(config(tmp_path))
    timing = ("seconds", "images_per_second")
    strip = [{k: v for k, v in row.items() if k not in timing} for row in rows(directory)]
    assert strip == [{k: v for k, v in row.items() if k not in timing} for row in before]


def test_a_finished_level_whose_source_has_changed_is_run_again(tmp_path: Path) -> None:
    directory = run(config(tmp_path))
    before = rows(directory)
    stamps = [directory.level(n).row.stat().st_mtime_ns for n in range(3)]
    Masks.load(directory.level(1).mask).save(directory.level(1).mask, source="0" * 64)
    run(config(tmp_path))
    again = [directory.level(n).row.stat().st_mtime_ns for n in range(3)]
    assert [new != old for new, old in zip(again, stamps, strict=True)] == [False, True, False]
    assert [row["weights_digest"] for row in rows(directory)] == [row["weights_digest"] for row in before]


def test_a_criterion_that_reads_data_gets_balanced_training_images(tmp_path: Path, monkeypatch) -> None:
    seen: list[torch.Tensor] = []

    def probe(model, masks, batches, loss, *, generator):
        """First-order importance, as a user would write it."""
        total = dict.fromkeys(masks, 0.0)
        for batch in batches:
            seen.append(batch[1])
            parameters = [dict(model.named_parameters())[name] for name in masks]
            gradients = torch.autograd.grad(loss(model, batch), parameters)
            for name, p, gradient in zip(masks, parameters, gradients, strict=True):
                total[name] = total[name] + (p * gradient).detach()
        return {name: value.abs() for name, value in total.items()}

    monkeypatch.setitem(criterion._entries, "probe", Entry("probe", probe, {"batchnorm": "eval", "reads": "train"}))
    monkeypatch.setattr(parsing, "declared", lambda kind: {**declared(kind), "probe": ""})
    params = config(tmp_path, training__epochs=0, levels__densities=[0.5])
    params = replace(params, pruning=replace(params.pruning, criterion="probe", samples_per_class=4))
    table = rows(run(params))
    assert int(table[1]["kept_weights"]) == int(0.5 * int(table[1]["prunable_weights"]) + 0.5)
    assert torch.cat(seen).bincount().tolist() == [4] * 10
