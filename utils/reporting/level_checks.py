"""What must hold of one level's files, for `verify`."""

from __future__ import annotations

import csv
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from utils.params import Params
from utils.params.plan import Level
from utils.reporting.bits import Tensors, read_mask, read_tensors
from utils.reporting.rows import Row, read_row
from utils.system.errors import UserError
from utils.system.rundir import RunDir

_LAST = {
    "train_loss": "train_loss", "train_acc": "train_acc", "val_acc": "val_acc", "test_loss": "test_loss",
    "test_acc": "final_test_acc", "test_acc_top5": "test_acc_top5",
}  # fmt: skip
"""Columns of the last line of epochs.csv and what row.json calls them."""


class LevelChecks:
    """Collects, in `problems()`, one line per thing that does not hold in a level folder."""

    def __init__(
        self, run: RunDir, number: int, params: Params | None, level: Level | None, environment: dict[str, Any]
    ) -> None:
        """level: its entry in the plan, None where the config cannot be read or plans fewer levels."""
        self.run, self.number, self.params, self.level, self.environment = run, number, params, level, environment
        self.place = run.level(number)
        self.found: list[str] = []

    def problems(self) -> list[str]:
        """All of them, in the order of the files."""
        row = self._row() if self.place.row.exists() else None
        if row:
            self._identity(row)
        if self.params is not None and self.params.structured.budget is not None:
            return self._structured(row)
        mask = self._tensors(self.place.mask, mask=True) if row or self.place.mask.exists() else None
        if mask:
            self._mask(mask, row)
            self._subset(mask, row)
            self._zeros(mask, row)
            if row or self.place.layers.exists():
                self._layers(mask, row)
        if row:
            self._epochs(row)
            self._rounds(row)
        return self.found

    # What is told -------------------------------------------------------------------------------------------------

    def _differs(self, path: Path, what: str, found: Any, expected: Any) -> None:
        if found != expected:
            self.found.append(f"{path}: {what} is {_word(found)}, expected {_word(expected)}")

    def _tensors(self, path: Path, mask: bool = False) -> Tensors | None:
        try:
            return read_mask(path) if mask else read_tensors(path)
        except UserError as error:
            self.found.append(" ".join(str(error).split()))
            return None

    def _table(self, path: Path) -> list[dict[str, str]] | None:
        try:
            with open(path, newline="", encoding="utf-8") as handle:
                return [{k or "": v or "" for k, v in line.items()} for line in csv.DictReader(handle)]
        except (OSError, ValueError, csv.Error, AttributeError) as error:
            self.found.append(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})")
            return None

    # What is looked at --------------------------------------------------------------------------------------------

    def _row(self) -> Row | None:
        try:
            return read_row(self.place.row)
        except UserError as error:
            self.found.append(" ".join(str(error).split()))
            return None

    def _identity(self, row: Row) -> None:
        path = self.place.row
        self._differs(path, "run", row["run"], self.run.path.resolve().name)
        self._differs(path, "level", row["level"], self.number)
        inputs = self.environment.get("inputs")
        for name in ("loader", "precision") if isinstance(inputs, dict) else ():
            self._differs(path, f"{name} (environment.json)", row[name], inputs.get(name))  # type: ignore[union-attr]
        if self.params is None:
            return
        params = self.params
        expected: dict[str, Any] = {
            "seed": params.run.seed, "model": params.model.name, "dataset": params.data.name,
            "moment": params.pruning.moment, "dynamic": params.dynamic.method,
        }  # fmt: skip
        if self.level is not None:
            expected["rewind"] = self.level.rewind
        for name, value in expected.items():
            self._differs(path, f"{name} (config.yaml)", row[name], value)

    def _mask(self, mask: Tensors, row: Row | None) -> None:
        kept = sum(mask.kept.values())
        total = sum(raw.size for raw in mask.raw.values())
        for name, value in {"digest": mask.mask_digest, "kept": str(kept), "total": str(total)}.items():
            self._differs(self.place.mask, f"{name} in its metadata", mask.metadata.get(name), value)
        if row is None:
            return
        density = kept / total if total else 1.0
        counted: dict[str, object] = {
            "mask_digest": mask.mask_digest, "kept_weights": kept, "prunable_weights": total, "density": density,
            "sparsity": 1.0 - density, "dead_layers": sum(not count for count in mask.kept.values()),
        }  # fmt: skip
        for name, number in counted.items():
            self._differs(self.place.row, f"{name} (mask.safetensors)", row[name], number)

    def _subset(self, mask: Tensors, row: Row | None) -> None:
        """Against the level this one prunes; where masks change in training, what it began with."""
        begun = self.place.start_mask
        path = begun if begun.exists() else self.place.mask
        if begun.exists():
            started = self._tensors(begun, mask=True)
            if started is None:
                return
            self._differs(begun, "digest in its metadata", started.metadata.get("digest"), started.mask_digest)
            mask = started
        if self.level is None or self.level.source is None:
            return
        source = self.run.level(self.level.source)
        if not source.mask.exists():
            self.found.append(f"{source.mask}: missing, level {self.number} prunes it")
            return
        above = self._tensors(source.mask, mask=True)
        if above is None:
            return
        for name, raw in mask.raw.items():
            if name not in above.raw or above.raw[name].size != raw.size:
                self.found.append(f"{path}: {name!r} is not masked so in {source.mask}, expected the same parameters")
            elif grown := int(np.count_nonzero(raw & ~(above.raw[name] != 0))):
                self.found.append(f"{path}: {name!r} keeps {grown} weights that {source.mask} prunes, expected none")
        if row is not None and source.row.is_file():
            try:
                made_from = read_row(source.row)["weights_digest"]
            except UserError:
                return  # told with that level
            self._differs(
                path, f"source in its metadata (level {self.level.source})", mask.metadata.get("source"), made_from
            )

    def _zeros(self, mask: Tensors, row: Row | None) -> None:
        digest = mask.mask_digest
        if row is not None or self.place.weights.exists():
            weights = self._tensors(self.place.weights)
            if weights is not None:
                self._pruned(self.place.weights, weights, mask, "")
                self._differs(
                    self.place.weights, "mask_digest in its metadata", weights.metadata.get("mask_digest"), digest
                )
                if row is not None:
                    self._differs(
                        self.place.row, "weights_digest (weights.safetensors)", row["weights_digest"], weights.digest
                    )
        self._average(mask, digest, row)
        # A rewind point taken while masks changed obeys a mask that no file holds.
        rewind = self.place.rewind
        if rewind.exists() and not self.place.start_mask.exists():
            state = self._tensors(rewind)
            if state is not None:
                self._pruned(rewind, state, mask, "model.")

    def _average(self, mask: Tensors | None, digest: str, row: Row | None) -> None:
        if self.place.average.exists() and (average := self._tensors(self.place.average)) is not None:
            self._pruned(self.place.average, average, mask, "")
            self._differs(
                self.place.average, "mask_digest in its metadata", average.metadata.get("mask_digest"), digest
            )
        ema = self.params is not None and self.params.training.ema is not None
        if ema and row is not None and not self.place.average.exists():
            self.found.append(f"{self.place.average}: missing, training.ema is set")

    def _pruned(self, path: Path, weights: Tensors, mask: Tensors | None, prefix: str) -> None:
        for name in weights.entries:
            if bad := weights.infinite(name):
                self.found.append(f"{path}: {name!r} holds {bad} NaN or infinite values, expected none")
        if mask is None:
            return
        for name, raw in mask.raw.items():
            entry = weights.entries.get(prefix + name)
            if entry is None or entry.shape != mask.entries[name].shape:
                shape = "missing" if entry is None else f"of shape {entry.shape}"
                self.found.append(
                    f"{path}: {prefix + name!r} is {shape}, expected {mask.entries[name].shape} of the mask"
                )
            elif alive := weights.alive(prefix + name, raw == 0):
                self.found.append(
                    f"{path}: {prefix + name!r} has {alive} pruned weights that are not +0.0, expected none"
                )

    def _layers(self, mask: Tensors, row: Row | None) -> None:
        path = self.place.layers
        table = self._table(path)
        if table is None:
            return
        if self.place.start_mask.exists() and row is None:
            return  # written with the start mask, and again at the level's end
        prunable = {line.get("name", ""): line for line in table if line.get("prunable") == "True"}
        self._differs(path, "the list of prunable parameters", sorted(prunable), sorted(mask.entries))
        kept = mask.kept
        for name in sorted(prunable.keys() & mask.entries.keys()):
            shape, count = mask.entries[name].shape, mask.raw[name].size
            expected = {
                "shape": "x".join(map(str, shape)) or "scalar", "numel": str(count), "kept": str(kept[name]),
                "density": repr(kept[name] / count if count else 1.0), "dead": str(kept[name] == 0 < count),
            }  # fmt: skip
            for column, value in expected.items():
                self._differs(path, f"{column} of {name!r}", prunable[name].get(column), value)
        effective = [line.get("effective", "") for line in prunable.values()]
        if row is not None and row["effective_density"] is not None and all(cell.isdecimal() for cell in effective):
            total = sum(map(int, effective)) / row["prunable_weights"] if row["prunable_weights"] else 1.0
            self._differs(self.place.row, "effective_density (layers.csv)", row["effective_density"], total)

    def _structured(self, row: Row | None) -> list[str]:
        """Of a level whose channels are taken out: it has widths, and a mask where single weights are pruned too."""
        if row is None:
            return self.found
        path = self.place.weights
        if self.place.mask.exists():
            if (mask := self._tensors(self.place.mask, mask=True)) is not None:
                self._zeros(mask, row)
                self._differs(self.place.row, "mask_digest", row["mask_digest"], mask.mask_digest)
        elif (weights := self._tensors(path)) is not None:
            self._pruned(path, weights, None, "")
            self._differs(self.place.row, "weights_digest (weights.safetensors)", row["weights_digest"], weights.digest)
            widths = weights.metadata.get("widths")
            if weights.metadata.get("mask_digest", widths) != widths:
                self.found.append(f"{self.place.mask}: missing, level {self.number} pruned single weights")
            else:
                self._differs(self.place.row, "mask_digest (weights.safetensors)", row["mask_digest"], widths)
            if self.level is None or self.level.work != "gates":  # gates alone have no average
                self._average(None, row["mask_digest"], row)
        share = row["kept_weights"] / row["prunable_weights"] if row["prunable_weights"] else 1.0
        self._differs(self.place.row, "density (kept_weights / prunable_weights)", row["density"], share)
        if row["kept_share"] is not None and not self.place.widths.exists():
            self.found.append(f"{self.place.widths}: missing, level {self.number} took channels out")
        self._epochs(row)
        return self.found

    def _rounds(self, row: Row) -> None:
        # Masks that change in training are pruned many times over; the row counts the rounds of the last.
        if (
            row["rounds"] is not None
            and row["dynamic"] is None
            and (table := self._table(self.place.rounds)) is not None
        ):
            self._differs(self.place.rounds, "the number of its rounds", len(table), row["rounds"])

    def _epochs(self, row: Row) -> None:
        path = self.place.epochs
        if row["epochs"] == 0 and not path.exists():
            return
        table = self._table(path)
        if table is None:
            return
        self._differs(path, "the number of its epochs", len(table), row["epochs"])
        try:
            epochs = [int(line["epoch"]) for line in table]
            steps = [int(line["step"]) for line in table]
            rates = [float(line["images_per_second"]) for line in table]
            tested = [(float(line["test_acc"]), _number(line["val_acc"])) for line in table if line["test_acc"]]
        except (KeyError, ValueError) as error:
            self.found.append(f"{path}: has no such cell or number ({error})")
            return
        if not table:
            return
        self._differs(path, "the column epoch", epochs, list(range(epochs[0], epochs[0] + len(epochs))))
        self._differs(path, "the column step", steps, sorted(set(steps)))
        self._differs(path, "the column level", {line["level"] for line in table}, {str(self.number)})
        for column, name in _LAST.items():
            self._differs(path, f"{column} of the last epoch", _number(table[-1].get(column, "")), row[name])
        best = max(
            (pair for pair in tested if pair[1] is not None), key=lambda pair: pair[1] or 0.0, default=(None, None)
        )
        expected = {
            "max_test_acc": max((pair[0] for pair in tested), default=row["max_test_acc"]),
            "best_val_test_acc": best[0],
            "images_per_second": statistics.median(rates),
        }
        for name, value in expected.items():
            self._differs(self.place.row, f"{name} (epochs.csv)", row[name], value)


def _number(cell: str) -> float | None:
    return float(cell) if cell else None


def _word(value: Any) -> str:
    text = "missing" if value is None else str(value)
    return text if len(text) <= 80 else f"{text[:60]}...{text[-12:]}"
