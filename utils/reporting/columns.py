"""The columns of levels.csv: their order, types and meaning, and the check every row passes."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from utils.system.errors import UserError
from utils.system.registry import nearest


@dataclass(frozen=True)
class Column:
    """One column.

    kind      int, float or str; a float column takes whole numbers too
    required  False: a level may have no such value, the cell is then empty
    low/high  inclusive bounds
    timing    differs between two runs of the same config and seed
    """

    name: str
    kind: type
    help: str
    required: bool = False
    low: float | None = None
    high: float | None = None
    timing: bool = False


def _percent(name: str, help: str) -> Column:
    return Column(name, float, help, low=0.0, high=100.0)


def _fraction(name: str, help: str, required: bool = True) -> Column:
    return Column(name, float, help, required=required, low=0.0, high=1.0)


def _count(name: str, help: str, required: bool = True) -> Column:
    return Column(name, int, help, required=required, low=0)


COLUMNS: tuple[Column, ...] = (
    Column("run", str, "name of the run directory", required=True),
    _count("seed", "run.seed"),
    _count("level", "number of the level"),
    _fraction("target_density", "density the plan asks for"),
    _fraction("density", "kept weights / prunable weights, reached"),
    _fraction("sparsity", "1 - density"),
    _count("kept_weights", "prunable weights the mask keeps"),
    _count("prunable_weights", "weights a mask may touch"),
    _count("epochs", "epochs trained in this level"),
    Column("train_loss", float, "mean training loss of the last epoch"),
    _percent("train_acc", "training accuracy of the last epoch, percent"),
    _percent("val_acc", "validation accuracy after the last epoch, percent; empty without a validation split"),
    Column("test_loss", float, "mean test loss after the last epoch"),
    _percent("final_test_acc", "test accuracy after the last epoch, percent"),
    _percent("max_test_acc", "best test accuracy of any epoch, percent; only for comparison with published tables"),
    _percent("test_acc_top5", "top-5 test accuracy after the last epoch, percent; empty for five classes or fewer"),
    _percent("best_val_test_acc", "test accuracy of the epoch with the best validation accuracy, percent"),
    _percent("pruned_test_acc", "test accuracy after pruning, before this level's training, percent"),
    Column("images_per_second", float, "training images per second over all ranks", low=0.0, timing=True),
    Column("seconds", float, "wall clock of the level", low=0.0, timing=True),
    Column("mask_digest", str, "digest of the mask's bits", required=True),
    Column("weights_digest", str, "digest of the last weights"),
    _count("dead_layers", "prunable layers with no weight left", required=False),
    Column(
        "effective_density", float, "kept weights on a path from input to output / prunable weights", low=0.0, high=1.0
    ),
    _count("macs_dense", "multiply-accumulates of one image of the stock network, whole", required=False),
    _count("macs", "multiply-accumulates of one image with what is kept", required=False),
    _count("parameters", "parameters of the network that was trained", required=False),
    _fraction("kept_share", "share of structured.budget that is kept, reached; empty without one", required=False),
    Column("peak_memory_mb", float, "memory of one training step at its peak, MB of 1e6 bytes", low=0.0, timing=True),
    Column("train_seconds_per_image", float, "seconds of a training step per image on one rank", low=0.0, timing=True),
    Column("seconds_per_image", float, "seconds of inference per image on one rank", low=0.0, timing=True),
    Column("model", str, "model.name"),
    Column("dataset", str, "data.name"),
    Column("criterion", str, "pruning.criterion; empty for a level that prunes nothing"),
    Column("allocation", str, "pruning.allocation; empty for a level that prunes nothing"),
    Column("pattern", str, "pruning.pattern, or the layer graph; empty for a level that prunes nothing"),
    _count("rounds", "score-and-prune rounds of the level's pruning", required=False),
    Column("moment", str, "pruning.moment"),
    _count("pruned_at_step", "optimizer step a pruning during training happened at", required=False),
    Column("dynamic", str, "method that changed the masks while training; the level's masks are no subset then"),
    Column("control", str, "pruning.control, where one was asked for"),
    Column("rewind", str, "what the level's weights and schedule start from; empty where nothing is rewound"),
    Column("precision", str, "precision the level trained in"),
    Column("loader", str, "loader that fed it"),
    _count("ranks", "processes that trained it", required=False),
)
"""In the order of the file. A new column is one entry here; rows written before it leave its cell empty."""

BY_NAME: dict[str, Column] = {column.name: column for column in COLUMNS}


def checked(row: Mapping[str, Any], source: str) -> dict[str, Any]:
    """`row` with every column, in order, absent ones None, numbers of float columns as floats.

    source  file or place the row comes from, for the message
    Raises UserError for an unknown column, a missing required one, a wrong type or a value out of range.
    """
    for name in row:
        if name not in BY_NAME:
            raise UserError(f"{source}: unknown column {name!r:.80}{nearest(name[:80], BY_NAME)}")
    return {column.name: _value(column, row.get(column.name), source) for column in COLUMNS}


def _is_of(value: Any, kind: type) -> bool:
    return type(value) is kind  # exactly: True is an int to isinstance


def _value(column: Column, value: Any, source: str) -> Any:
    if value is None:
        if column.required:
            raise UserError(f"{source}: {column.name} is missing; delete the file to run its level again")
        return None
    if column.kind is float and type(value) is int:
        value = float(value)
    if not _is_of(value, column.kind):
        raise UserError(f"{source}: {column.name}={value!r:.80} is not of type {column.kind.__name__}")
    if column.kind is str and any(unicodedata.category(letter) in ("Cc", "Cs") for letter in value):
        raise UserError(f"{source}: {column.name}={value!r:.80} holds control characters")
    if column.kind is float and not math.isfinite(value):
        raise UserError(f"{source}: {column.name}={value!r} is not a finite number")
    if (column.low is not None and value < column.low) or (column.high is not None and value > column.high):
        raise UserError(f"{source}: {column.name}={value!r} lies outside {column.low} to {column.high}")
    return value


def cell(value: Any) -> str:
    """A value as levels.csv writes it: nothing for None, floats with all their digits."""
    if value is None:
        return ""
    return repr(value) if isinstance(value, float) else str(value)
