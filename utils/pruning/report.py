"""What a mask keeps, parameter by parameter, and what each round did: CSV files, and tables for the console."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from utils.masks import Masks, bare
from utils.pruning.convert import MASK_FILE, convert
from utils.system.atomic import replacing

if TYPE_CHECKING:
    from utils.pruning.harness import Round


@dataclass(frozen=True)
class Row:
    """One parameter. A parameter that is not prunable counts as wholly kept and is never dead.

    shape: sizes joined by `x` (`scalar` for none); density: kept / numel; dead: prunable, and no weight is kept;
    effective: kept weights on a path from input to output, None where it is not known; width: rows (output channels)
    with a kept weight.
    """

    name: str
    shape: str
    prunable: bool
    numel: int
    kept: int
    density: float
    dead: bool
    effective: int | None = None
    width: int | None = None


def layer_rows(model: nn.Module, masks: Masks, effective: Mapping[str, int] | None = None) -> list[Row]:
    """A row for every parameter of the bare model, in its order; tied parameters once.

    effective: per entry of `masks`, where known. Raises ValueError for a count that is none of that layer's.
    """
    masks.check(model)
    _check_effective(masks, effective or {})
    return [_row(name, tuple(p.shape), masks, effective or {}) for name, p in bare(model).named_parameters()]


def mask_rows(masks: Masks, effective: Mapping[str, int] | None = None) -> list[Row]:
    """A row for every entry of `masks`, where there is no model; see `layer_rows`."""
    _check_effective(masks, effective or {})
    return [_row(name, tuple(mask.shape), masks, effective or {}) for name, mask in masks.items()]


def _check_effective(masks: Masks, effective: Mapping[str, int]) -> None:
    for name, count in effective.items():
        if not 0 <= count <= masks.counts.get(name, -1):
            raise ValueError(f"{count} effective weights of {name!r}, which keeps {masks.counts.get(name)}")


def _row(name: str, shape: tuple[int, ...], masks: Masks, effective: Mapping[str, int]) -> Row:
    prunable, numel = name in masks, math.prod(shape)
    kept = masks.counts[name] if prunable else numel
    density = kept / numel if numel else 1.0
    dead = prunable and kept == 0 < numel
    sizes = "x".join(map(str, shape)) or "scalar"
    width = int(np.count_nonzero(masks[name].flatten(1).numpy().any(1))) if prunable and len(shape) > 1 else None
    return Row(name, sizes, prunable, numel, kept, density, dead, effective.get(name), width)


def write_layers_csv(
    path: str | Path, model: nn.Module, masks: Masks, effective: Mapping[str, int] | None = None
) -> None:
    """Write `layer_rows` as CSV, atomically; densities in full precision, truth values as True and False."""
    _write_csv(path, [field.name for field in fields(Row)], map(astuple, layer_rows(model, masks, effective)))


def write_rounds_csv(path: str | Path, rounds: Sequence[Round]) -> None:
    """Write number (from 1), requested and reached density of every round as CSV, atomically, in full precision."""
    rows = ((number, one.requested, one.reached) for number, one in enumerate(rounds, start=1))
    _write_csv(path, ["round", "requested", "reached"], rows)


def _write_csv(path: str | Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def layer_table(model: nn.Module, masks: Masks, effective: Mapping[str, int] | None = None) -> str:
    """The prunable parameters, their counts and the total, as aligned text without a final newline.

    Where effective counts are known, they and the effective density (effective / numel) stand beside the density;
    their total is that of all layers, so it stands only when all are known.
    """
    return _table([row for row in layer_rows(model, masks, effective) if row.prunable])


def mask_table(masks: Masks, effective: Mapping[str, int] | None = None) -> str:
    """`layer_table` without a model: shapes and order are the masks'."""
    return _table(mask_rows(masks, effective))


def _table(rows: Sequence[Row]) -> str:
    known = [row.effective for row in rows if row.effective is not None]
    extra = ["effective", "eff. density"] if known else []
    lines = [["parameter", "shape", "weights", "kept", "density", *extra, ""]]
    lines += [
        [row.name, row.shape, *_counts(row.numel, row.kept, row.effective, bool(known)), "dead" if row.dead else ""]
        for row in rows
    ]
    numel, kept = sum(row.numel for row in rows), sum(row.kept for row in rows)
    effective = sum(known) if len(known) == len(rows) else None
    lines.append(["total", "", *_counts(numel, kept, effective, bool(known)), ""])
    return aligned(lines, "<<" + ">" * (len(lines[0]) - 3) + "<")


def _counts(numel: int, kept: int, effective: int | None, with_effective: bool) -> list[str]:
    def density(count: int) -> str:
        return f"{count / numel if numel else 1.0:.4f}"

    cells = [f"{numel:,}", f"{kept:,}", density(kept)]
    if with_effective:
        cells += ["", ""] if effective is None else [f"{effective:,}", density(effective)]
    return cells


def rounds_table(rounds: Sequence[Round]) -> str:
    """Requested and reached density of every round, as aligned text without a final newline."""
    lines = [["round", "requested", "reached"]]
    lines += [[str(number), f"{one.requested:.6f}", f"{one.reached:.6f}"] for number, one in enumerate(rounds, start=1)]
    return aligned(lines, ">>>")


def inspect_text(path: str | Path, model: nn.Module | None = None) -> str:
    """What any file that `convert` reads masks from holds: its kind, metadata, digest, layers, totals and dead layers.

    Raises UserError as `convert` does.
    """
    found = convert(path, model)
    masks = found.masks
    facts = {"file": str(path), "kind": found.form}
    if found.form == MASK_FILE:
        facts |= {name: value for name, value in sorted(found.metadata.items()) if name not in ("kept", "total")}
    facts |= {"digest": masks.digest, "kept": f"{masks.kept:,}", "total": f"{masks.total:,}"}
    facts["density"] = f"{masks.density:.6f}"
    dead = [row.name for row in mask_rows(masks) if row.dead]
    facts["dead layers"] = f"{len(dead)}{': ' if dead else ''}{', '.join(dead)}"
    if found.whole:
        facts["not masked by the file"] = ", ".join(found.whole)
    return f"{aligned([[name, value] for name, value in facts.items()], '<<')}\n\n{mask_table(masks)}"


def aligned(lines: Sequence[Sequence[str]], sides: str) -> str:
    """Lines of cells as columns two spaces apart; `sides` has < or > for each column."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(f"{text:{side}{width}}" for text, side, width in zip(line, sides, widths, strict=True)).rstrip()
        for line in lines
    )
