"""The record of a run: its config, what it ran on, its state, and the rows of its epochs."""

from __future__ import annotations

import csv
import functools
import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import torch
import yaml

from utils import reporting
from utils.data import Loaders, default_workers
from utils.masks import Masks
from utils.models.pretrained import local_file
from utils.params import Params
from utils.params.identity import run_path
from utils.params.parsing import dump
from utils.params.plan import SINGLE, Level, prunes_start
from utils.system import environment
from utils.system.atomic import explaining, replacing, sha256, sweep, write_json, write_text
from utils.system.cpus import allowed_cpus
from utils.system.distributed import World, from_main
from utils.system.errors import UserError
from utils.system.json_file import read_json
from utils.system.rundir import RunDir, planted_links
from utils.training import reduction
from utils.training.progress import of_stock_network

Row = dict[str, Any]
_REDUCTION = "distributed.reduction"

EPOCH_COLUMNS = (
    "level", "epoch", "step", "lr", "train_loss", "train_acc", "val_loss", "val_acc", "test_loss", "test_acc",
    "test_acc_top5", "density", "distance", "mask_updates", "regrown", "gates_mean", "gates_open",
    "soft", "ghost", "ghost_weights", "smoothing", "images_per_second", "data_wait", "seconds",
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What the record keeps of a finished level, besides its rows.

    final: its last evaluation; pruned: test accuracy after pruning, before training; effective: effective density
    """

    masks: Masks
    rows: list[Row]
    final: Row
    pruned: float | None
    weights_digest: str
    effective: float
    rounds: int | None
    pruned_at_step: int | None


def run_dir(params: Params) -> RunDir:
    """The directory of the run this config names."""
    return RunDir(run_path(params))


class Record:
    """Writes config.yaml, environment.json and status.json. Rank 0 alone calls its methods."""

    def __init__(
        self, params: Params, loaders: Loaders, dtype: torch.dtype, world: World, device: torch.device
    ) -> None:
        self.params = params
        self.dir = run_dir(params)
        self._world, self._device = world, device
        pretrained = local_file(params.model.pretrained)
        self.inputs = {
            "loader": loaders.loader,
            "precision": str(dtype).removeprefix("torch."),
            "pretrained": from_main(lambda: sha256(pretrained)) if pretrained is not None else None,
            **_sums(params, world, device),
            **_mask_files(params),
            **{f"data {split}": digest for split, digest in loaders.digests.items()},
        }

        spec, training = loaders.spec, params.training
        self.settled = {
            "device": str(device),
            "precision": self.inputs["precision"],
            "workers": min(params.data.workers or default_workers(world.local_size), allowed_cpus()),
            "reduction": reduction.choose(params.distributed, world, device) if world.size > 1 else None,
            "order_seed": params.run.seed if params.data.order_seed is None else params.data.order_seed,
            "image_size": spec.image_size,
            "eval_size": spec.eval_size,
            "augment": spec.augment,
            "flip": spec.flip,
            "write_mode": spec.write_mode,
            "max_resolution": spec.max_resolution,
            "eval_batch_size": training.eval_batch_size
            or 2 * training.batch_size // (world.size * training.accumulation),
        }

    def start(self) -> None:
        """Open the run. Raises UserError when its directory was filled from other inputs, naming which."""
        if links := planted_links(self.dir):
            raise UserError(f"{links[0]}: is a symbolic link; a run keeps its files itself: remove the link")
        sweep(self.dir.path)
        here = environment.describe(self._world, self._device)
        if self.dir.environment.is_file():
            record = self._compare()
        else:
            record = {"inputs": self.inputs, "auto": self.settled, "seeds": self._seeds(), **here, "starts": []}
        record["starts"] = [*record.get("starts", []), environment.start_of(here)][-environment.MOST_STARTS :]
        write_json(self.dir.environment, record)
        # What this process alone was asked for is left out: passed back, the file runs the whole plan.
        run, levels = replace(self.params.run, plan=False), replace(self.params.levels, only=None, wait=0.0)
        whole = replace(self.params, run=run, levels=levels)
        write_text(self.dir.config, yaml.safe_dump(dump(whole), sort_keys=False))
        self.status("running")

    def _seeds(self) -> dict[str, Any]:
        run, data = self.params.run, self.params.data
        return {"run": run.seed, "order": self.settled["order_seed"], "split": data.split_seed}

    def _compare(self) -> dict[str, Any]:
        """The record there is, once its inputs are found to be this process's."""
        path = self.dir.environment
        try:
            record: dict[str, Any] = read_json(path)
            before = {str(name): value for name, value in record["inputs"].items()}
            record["starts"] = list(record.get("starts", []))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: not readable; remove the run directory or use another run.name") from error
        for name in sorted(before.keys() | self.inputs.keys()):
            old, new = before.get(name), self.inputs.get(name)
            if old != new and not (name == _REDUCTION and None in (old, new)):  # another number of ranks
                raise UserError(
                    f"{self.dir.path}: {name} was {_short(old)} when this run began and is {_short(new)} now; "
                    "restore it, or use another run.name"
                )
        return record

    def level_row(self, level: Level, outcome: Outcome) -> Row:
        """The level's row of levels.csv, without its `seconds`."""
        params, rows, masks = self.params, outcome.rows, outcome.masks
        last: Row = rows[-1] if rows else {}
        throughput = [row["images_per_second"] for row in rows]
        return {
            "run": self.dir.path.name,
            "seed": params.run.seed,
            "level": level.number,
            "target_density": masks.density if params.graph.degree is not None else level.density,
            "density": masks.density,
            "sparsity": 1.0 - masks.density,
            "kept_weights": masks.kept,
            "prunable_weights": masks.total,
            "epochs": len(rows),
            "train_loss": last.get("train_loss"),
            "train_acc": last.get("train_acc"),
            **_accuracies(rows, outcome.final),
            "pruned_test_acc": outcome.pruned,
            "images_per_second": statistics.median(throughput) if rows else None,
            "mask_digest": masks.digest,
            "weights_digest": outcome.weights_digest,
            "dead_layers": sum(count == 0 for count in masks.counts.values()),
            "effective_density": outcome.effective,
            "model": params.model.name,
            "dataset": params.data.name,
            **_method(params, level, masks),
            "rounds": outcome.rounds,
            "moment": params.pruning.moment,
            "pruned_at_step": outcome.pruned_at_step,
            "dynamic": params.dynamic.method,
            "rewind": level.rewind,
            "precision": self.inputs["precision"],
            "loader": self.inputs["loader"],
            "ranks": self._world.size,
        }

    def finish(self, levels: list[int]) -> None:
        """Rebuild levels.csv and say whether the run is done, or which levels are."""
        reporting.rebuild(self.dir)
        done = [number for number in levels if self.dir.level(number).row.is_file()]
        whole, only = len(done) == len(levels), self.params.levels.only
        write_json(self.dir.status, {"state": "done"} if whole else {"state": "partial", "levels": done})
        if only is not None:
            write_json(self.dir.level(only).status, {"state": "done"})

    def status(self, state: str, **more: Any) -> None:
        """Write status.json, and that of the level when this process runs it alone."""
        write_status(self.params, state, **more)


def write_status(params: Params, state: str, **more: Any) -> None:
    """Write status.json; of a process that runs one level alone, the level's too, which others do not overwrite."""
    for path in _status_files(params):
        write_json(path, {"state": state, **more})


def fail(params: Params, reason: str) -> None:
    """Mark a run that is under way as failed. The first reason stays: the other ranks fail because one did."""
    for path in _status_files(params):
        try:
            running = json.loads(path.read_text(encoding="utf-8"))["state"] == "running"
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if running:
            write_json(path, {"state": "failed", "reason": reason})


def _status_files(params: Params) -> list[Path]:
    """What its process reports of a level is never lost to another task of the run."""
    own, run = run_dir(params).status_of(params.levels.only), run_dir(params).status
    return [run] if own == run else [own, run]


class EpochsCsv:
    """epochs.csv, one row per epoch, on disk as the epoch ends. Without a path it writes nothing.

    rows: of the epochs before; whatever else the file held is cut off.
    """

    def __init__(self, path: Path | None, rows: Sequence[Row] = ()) -> None:
        self.path = path
        self._before = rows

    def __enter__(self) -> EpochsCsv:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as handle:
                _epochs_writer(handle).writeheader()
                for row in self._before:
                    _epochs_writer(handle).writerow(_cells(row))
            self._handle = open(self.path, "a", newline="", encoding="utf-8")
            self._writer = _epochs_writer(self._handle)
        return self

    def write(self, row: dict[str, Any]) -> None:
        """Append a row and flush it to disk. None becomes an empty cell."""
        if self.path is not None:
            with explaining(self.path):
                self._writer.writerow(_cells(row))
                self._handle.flush()
                os.fsync(self._handle.fileno())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.path is not None:
            with explaining(self.path):  # a full disk refuses what is left in the buffer once more
                self._handle.close()


def _epochs_writer(handle: TextIO) -> csv.DictWriter[str]:
    return csv.DictWriter(handle, EPOCH_COLUMNS, extrasaction="ignore", lineterminator="\n")


def _cells(row: Row) -> Row:
    return {key: "" if value is None else value for key, value in row.items()}


def _accuracies(rows: list[Row], final: Row) -> Row:
    """The accuracy columns: of the last epoch, of the best test epoch, and of the epoch with the best val accuracy.

    The best are among the epochs whose network was the stock one: weights of another are not what the files hold.
    """
    evaluated = [row for row in rows if "test_acc" in row and of_stock_network(row)]
    validated = [row for row in evaluated if row["val_acc"] is not None]
    best = max(validated, key=lambda row: row["val_acc"], default=None)
    return {
        "val_acc": final["val_acc"],
        "test_loss": final["test_loss"],
        "final_test_acc": final["test_acc"],
        "max_test_acc": max([row["test_acc"] for row in evaluated] or [final["test_acc"]]),
        "test_acc_top5": final["test_acc_top5"],
        "best_val_test_acc": best and best["test_acc"],
    }


def _method(params: Params, level: Level, masks: Masks) -> Row:
    """What chose the level's masks; all empty where nothing was pruned."""
    section, graph = params.pruning, params.graph
    if masks.kept == masks.total:
        return {"criterion": None, "allocation": None, "pattern": None, "control": None}
    control = None if section.control == "none" else section.control
    if graph.kind is not None:
        by_degree = graph.degree is not None
        allocation = None if by_degree else section.allocation
        return {"criterion": None, "allocation": allocation, "pattern": f"graph {graph.kind}", "control": control}
    criterion, allocation = section.criterion, section.allocation
    if level.number == 0 and params.levels.start is not None:
        criterion, allocation = params.levels.start_criterion or criterion, params.levels.start_allocation or allocation
    elif section.mask_file is not None and not prunes_start(params, level.density):
        criterion = allocation = f"file {Path(section.mask_file).name}"
        control = control if control == "reinitialise" else None
    if control == "reinitialise" and level.source is None and section.moment not in SINGLE:
        control = None
    return {"criterion": criterion, "allocation": allocation, "pattern": section.pattern, "control": control}


def _sums(params: Params, world: World, device: torch.device) -> dict[str, Any]:
    """How gradients are reduced, where the order of sums follows from it: two ranks sum alike either way."""
    if world.size < 3:
        return {}
    choice = reduction.choose(params.distributed, world, device)
    below = f" below {params.distributed.packed_below:g}" if choice == "packed" else ""
    return {_REDUCTION: choice + below}


def _mask_files(params: Params) -> dict[str, str]:
    """Digests of the mask files the run reads, so that a rerun with another one is refused."""
    named = {"mask file": params.pruning.mask_file, "from_mask": params.pruning.from_mask}
    return {what: from_main(functools.partial(_digest, path)) for what, path in named.items() if path is not None}


def _digest(path: str) -> str:
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    return sha256(Path(path))


def _short(value: Any) -> str:
    return "absent" if value is None else str(value)[:16]
