"""A finished level's weights, checked against its mask and evaluated again. Writes nothing into the run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from utils import data, files, models
from utils.data.order import Shard
from utils.masks import Masks
from utils.params import Params
from utils.reporting import read_row
from utils.system import distributed
from utils.system.console import Console
from utils.system.distributed import World
from utils.system.errors import UserError
from utils.system.rundir import LevelDir
from utils.tasks.classification import ImageClassification
from utils.training.parallel import to_channels_last
from utils.training.recipe.soft import soften
from utils.training.trainer import Trainer

COLUMNS = {
    "val_acc": "val_acc",
    "test_loss": "test_loss",
    "test_acc": "final_test_acc",
    "test_acc_top5": "test_acc_top5",
}
"""What is measured here, and the column of row.json that holds it. row.json has no val_loss."""

ROUNDING = {"val_acc": 0.1, "test_acc": 0.1, "test_acc_top5": 0.1, "test_loss": 1e-3}
"""Largest difference (percent points; relative for the loss) that other kernels or ranks may make."""


@dataclass(frozen=True)
class Evaluation:
    """measured: val_loss and val_acc (None without val), test_loss, test_acc, test_acc_top5 (None for few classes).

    agreement: `exact`, `rounding`, `differs`, or None where row.json has the numbers of other weights.
    """

    measured: dict[str, float | None]
    recorded: dict[str, float | None]
    agreement: str | None
    file: Path
    density: float


def evaluate(params: Params, place: LevelDir, average: bool, world: World, device: torch.device) -> Evaluation:
    """Evaluate a level on all ranks; every sample counts once.

    average: its averaged weights. Raises UserError for a level that is not finished, files that are damaged, not of
    this model, or do not belong together.
    """
    row = distributed.from_main(lambda: read_row(_there(place.row)))
    training = params.training
    shard = Shard(world.rank, world.size, training.batch_size, training.accumulation)
    workers = params.data.workers or data.default_workers(world.local_size)
    loaders = data.build(params, shard, device, training.channels_last, workers)
    try:
        spec = loaders.spec
        file = place.average if average else place.weights
        if place.widths.is_file():
            model, density = models.rebuild(place.widths, _there(file)), row["density"]
        else:
            model = models.build(params.model.name, spec.classes, image_size=spec.image_size, seed=params.run.seed)
            soften(model, params.recipe)
            density = load(model, place, file).density
        model.to(device)
        if training.channels_last:
            to_channels_last(model)
        task = ImageClassification(spec.classes, test_flip=training.test_flip)
        console = Console(main=False)
        trainer = Trainer(
            model, task, loaders, training, params.distributed,
            seed=params.run.seed, world=world, device=device, console=console,
        )  # fmt: skip
        measured = trainer.evaluate_all()
    finally:
        loaders.close()
    recorded = {name: row[column] for name, column in COLUMNS.items()}
    # A run with an average records the accuracies of the average.
    same = average == (training.ema is not None)
    return Evaluation(measured, recorded, _agreement(measured, recorded) if same else None, file, density)


def load(model: nn.Module, place: LevelDir, file: Path) -> Masks:
    """Put the weights in `file` into a bare model and return the level's masks.

    Raises UserError unless both are whole, of this model, and belong together: pruned weights are 0.0.
    """
    masks = Masks.load(_there(place.mask), model)
    made_for = files.load_metadata(_there(file)).get("mask_digest")
    if made_for != masks.digest:
        raise UserError(f"{file}: belongs to another mask than {place.mask}; run the level again")
    weights = files.load_weights(file, model)
    for name, mask in masks.items():
        if bool((weights[name] != 0)[~mask].any()):
            raise UserError(f"{file}: pruned weights of {name!r} are not 0.0; run the level again")
    files.put_weights(model, weights, str(file))
    return masks


def describe(found: Evaluation) -> str:
    """What was measured, as lines of text."""
    cells = {name: "-" if value is None else f"{value:.4f}" for name, value in found.measured.items()}
    lines = [f"{found.file}: density {found.density:.4f}"]
    lines += [f"  {name:14}{cell:>9}" for name, cell in cells.items()]
    words = {
        "exact": "row.json: agrees exactly",
        "rounding": "row.json: agrees within rounding",
        "differs": "row.json: differs, it has "
        + ", ".join(f"{name} {value}" for name, value in found.recorded.items() if value is not None),
        None: "row.json: has the numbers of other weights (training.ema: those of the average), not compared",
    }
    return "\n".join([*lines, words[found.agreement]])


def as_json(found: Evaluation) -> dict[str, Any]:
    """What was measured, for a JSON file."""
    return {
        "file": str(found.file),
        "density": found.density,
        "measured": found.measured,
        "recorded": found.recorded,
        "agreement": found.agreement,
    }


def _there(path: Path) -> Path:
    if not path.is_file():
        raise UserError(f"{path}: no such file; evaluate a finished level that has it")
    return path


def _agreement(measured: dict[str, float | None], recorded: dict[str, float | None]) -> str:
    if all(measured[name] == value for name, value in recorded.items()):
        return "exact"
    for name, value in recorded.items():
        got = measured[name]
        if value is None or got is None:
            if value is not got:
                return "differs"
        elif abs(got - value) > ROUNDING[name] * (abs(value) if name == "test_loss" else 1.0):
            return "differs"
    return "rounding"
