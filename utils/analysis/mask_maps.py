"""Masks of levels, seeds or methods side by side: Hamming and Jaccard per layer for every pair, and a heat map."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils.masks import Masks
from utils.pruning.compare import Agreement, compare, total
from utils.system import atomic
from utils.system.errors import UserError
from utils.system.rundir import RunDir

COLUMNS = ("a", "b", "parameter", "weights", "kept_a", "kept_b", "both", "jaccard", "hamming", "hamming_share")


def read_masks(places: Sequence[str | Path]) -> dict[str, Masks]:
    """Masks by label: a mask file, or a run directory with a mask per finished level. UserError for fewer than two.

    A run's label is its directory's name; its whole path where another has that name.
    """
    found: dict[str, Masks] = {}
    named: dict[str, set[Path]] = {}
    for place in map(Path, places):
        named.setdefault(place.name, set()).add(place)
    for place in map(Path, places):
        if place.is_dir():
            run = RunDir(place)
            name = place.name if len(named[place.name]) == 1 else str(place)
            files = [(f"{name} level {n}", run.level(n).mask) for n in run.levels() if run.level(n).mask.exists()]
            if not files:
                raise UserError(f"{place}: no masks in it; name a run directory or mask files")
        else:
            files = [(str(place), place)]
        found |= {label: Masks.load(file) for label, file in files}
    if len(found) < 2:
        raise UserError("masks: one mask alone; name two or more mask files, or a run of several levels")
    return found


def mask_rows(masks: dict[str, Masks]) -> list[dict[str, Any]]:
    """A row per pair and parameter, and one per pair called `total`. Raises UserError for masks of different models."""
    rows = []
    for (a, one), (b, other) in itertools.combinations(masks.items(), 2):
        try:
            layers = compare(one, other)
        except UserError as error:
            raise UserError(f"{a} and {b}: {error}") from None
        rows += [_row(a, b, layer) for layer in [*layers, total(layers)]]
    return rows


def _row(a: str, b: str, layer: Agreement) -> dict[str, Any]:
    return {
        "a": a,
        "b": b,
        "parameter": layer.name,
        "weights": layer.numel,
        "kept_a": layer.kept_a,
        "kept_b": layer.kept_b,
        "both": layer.both,
        "jaccard": layer.jaccard,
        "hamming": layer.hamming,
        "hamming_share": layer.hamming / layer.numel if layer.numel else 0.0,
    }


def plot_masks(rows: list[dict[str, Any]], out: Path, measure: str = "jaccard") -> Path:
    """A heat map: pairs across, layers down, `measure` (jaccard or hamming_share) as colour; returns its path."""
    from matplotlib.figure import Figure

    pairs = list(dict.fromkeys((row["a"], row["b"]) for row in rows))
    layers = list(dict.fromkeys(row["parameter"] for row in rows))
    values = {((row["a"], row["b"]), row["parameter"]): row[measure] for row in rows}
    longest = max(len(f"{a} | {b}") for a, b in pairs)
    size = (4.5 + 0.5 * len(pairs), 2.5 + 0.07 * longest + 0.22 * len(layers))
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow([[values[pair, layer] for pair in pairs] for layer in layers], vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(pairs)), [f"{a} | {b}" for a, b in pairs], rotation=90, fontsize="x-small")
    axes.set_yticks(range(len(layers)), layers, fontsize="x-small")
    figure.colorbar(image, label=measure.replace("_", " "))
    with atomic.replacing(out) as temporary:
        figure.savefig(temporary, format=out.suffix.lower().lstrip(".") or "png")
    return out
