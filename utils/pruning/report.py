"""What a mask keeps, parameter by parameter: layers.csv and a table for the console."""

from __future__ import annotations

import csv
import math
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from torch import nn

from utils.masks import Masks, bare
from utils.system.atomic import replacing


@dataclass(frozen=True)
class Row:
    """One parameter. A parameter that is not prunable counts as wholly kept and is never dead.

    shape: sizes joined by `x` (`scalar` for none); density: kept / numel; dead: prunable, and no weight is kept.
    """

    name: str
    shape: str
    prunable: bool
    numel: int
    kept: int
    density: float
    dead: bool


def layer_rows(model: nn.Module, masks: Masks) -> list[Row]:
    """A row for every parameter of the bare model, in its order; tied parameters once."""
    masks.check(model)
    return [_row(name, tuple(p.shape), masks) for name, p in bare(model).named_parameters()]


def _row(name: str, shape: tuple[int, ...], masks: Masks) -> Row:
    prunable, numel = name in masks, math.prod(shape)
    kept = masks.counts[name] if prunable else numel
    density = kept / numel if numel else 1.0
    dead = prunable and kept == 0 < numel
    return Row(name, "x".join(map(str, shape)) or "scalar", prunable, numel, kept, density, dead)


def write_layers_csv(path: str | Path, model: nn.Module, masks: Masks) -> None:
    """Write `layer_rows` as CSV, atomically; densities in full precision, truth values as True and False."""
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(field.name for field in fields(Row))
        writer.writerows(astuple(row) for row in layer_rows(model, masks))


def layer_table(model: nn.Module, masks: Masks) -> str:
    """The prunable parameters, their counts and the total, as aligned text without a final newline."""
    lines = [("parameter", "shape", "weights", "kept", "density", "")]
    for row in layer_rows(model, masks):
        if row.prunable:
            counts = (f"{row.numel:,}", f"{row.kept:,}", f"{row.density:.4f}")
            lines.append((row.name, row.shape, *counts, "dead" if row.dead else ""))
    lines.append(("total", "", f"{masks.total:,}", f"{masks.kept:,}", f"{masks.density:.4f}", ""))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(_aligned(line, widths) for line in lines)


def _aligned(line: tuple[str, ...], widths: list[int]) -> str:
    cells = zip(line, widths, ("<", "<", ">", ">", ">", "<"), strict=True)
    return "  ".join(f"{text:{side}{width}}" for text, width, side in cells).rstrip()
