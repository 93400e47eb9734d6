"""The analyses as `python -m utils.reporting` calls them: arguments to files and one line."""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from utils import files
from utils.analysis import activations, connectivity, mask_maps
from utils.analysis.level import OpenLevel, finished_weights, open_level, params_of
from utils.data.protocol import Loader
from utils.params import Params
from utils.params.catalog import keys
from utils.system import atomic
from utils.system.errors import UserError
from utils.system.rundir import RunDir
from utils.tasks import Batch
from utils.tasks.classification import ImageClassification


def run(args: argparse.Namespace) -> str:
    """Do what `args` say; returns what to print. Raises UserError."""
    if args.command != "gradients" and args.out.suffix != ".csv":
        raise UserError(f"--out={args.out}: the rows are a CSV; end the name in .csv (a .png is written beside it)")
    if args.command == "gradients" and args.out.suffix not in (".png", ".pdf", ".svg"):
        raise UserError(f"--out={args.out}: unknown image type; end the name in .png, .pdf or .svg")
    commands = {"activations": _activations, "masks": _masks, "connectivity": _connectivity, "gradients": _gradients}
    return commands[args.command](args)


def _activations(args: argparse.Namespace) -> str:
    if not 0.0 <= args.near < math.inf:
        raise UserError(f"--near={args.near:g}: not a size; give a number from 0 up")
    with open_level(args.run, args.level) as level:
        rows = activations.activation_rows(level.model, level.images(args.split), args.near)
    _write(args.out, activations.COLUMNS, rows)
    return _wrote(args.out, activations.plot_activations(rows, _image(args.out)))


def _masks(args: argparse.Namespace) -> str:
    rows = mask_maps.mask_rows(mask_maps.read_masks(args.places))
    _write(args.out, mask_maps.COLUMNS, rows)
    return _wrote(args.out, mask_maps.plot_masks(rows, _image(args.out), args.measure))


def _connectivity(args: argparse.Namespace) -> str:
    second = args.level if args.second_level is None else args.second_level
    other = params_of(args.runs[1])
    weights = finished_weights(args.runs[1], second, "--second-level" if args.second_level is not None else "--level")
    with open_level(args.runs[0], args.level) as level:
        _check_alike(level.params, other, args.runs)
        task = ImageClassification(level.loaders.spec.classes)
        a = {name: value.clone() for name, value in files.state_of(level.model).items()}
        b = {name: value.to(level.device) for name, value in files.load_weights(weights).items()}
        shown = list(_first(level, args.batches))

        def score(model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
            totals = task.totals(level.device)
            for batch in batches:
                totals += task.evaluate_batch(model, batch)
            return task.read(totals)

        test: Loader = level.loaders.test
        rows = connectivity.connectivity_rows(
            level.model, a, b, args.points, lambda: shown, lambda m: score(m, test), lambda m: score(m, shown)
        )
    _write(args.out, connectivity.COLUMNS, rows)
    barred = connectivity.barrier(rows)
    return f"{_wrote(args.out, connectivity.plot_connectivity(rows, _image(args.out)))}; error barrier {barred:.2f}"


def _check_alike(one: Params, other: Params, runs: Sequence[str]) -> None:
    """Raise UserError where the two networks do not compute the same function of their weights, or see other images."""
    names = ["model.name", "data.name", "data.image_size", "recipe.soft.keep"]
    if one.recipe.soft.keep:
        names += ["recipe.soft.kind", "recipe.soft.beta"]
    for name in names:
        values = [keys()[name].of(params) for params in (one, other)]
        if values[0] != values[1]:
            raise UserError(
                f"connectivity: {name} is {values[0]} in {runs[0]} and {values[1]} in {runs[1]}; compare runs of one "
                "network and data set"
            )


def _first(level: OpenLevel, count: int) -> Iterator[Batch]:
    """The first `count` training batches, or as many as there are."""
    if count < 1:
        raise UserError(f"--batches={count}: BatchNorm needs training images; give 1 or more")
    level.loaders.train.set_epoch(0, 0)
    for images, labels in itertools.islice(level.loaders.train, count):
        yield images.clone(), labels.clone()


def _gradients(args: argparse.Namespace) -> str:
    path = RunDir(Path(args.run)).level(args.level).gradients
    if not path.is_file():
        raise UserError(f"{path}: missing; train the level with --training.gradient_norms=STEPS")
    from matplotlib.figure import Figure

    try:
        frame = pd.read_csv(path, index_col="step").astype(float)
        above = frame[np.isfinite(frame) & (frame > 0)]
    except (ValueError, UnicodeDecodeError):  # pandas' parser errors are ValueErrors too
        raise UserError(f"{path}: not what training.gradient_norms writes; run the level again") from None
    if above.isna().all(axis=None):
        raise UserError(f"{path}: no gradient in it is above 0, so there is nothing to plot")
    figure = Figure(figsize=(6.4, 2.5 + 0.15 * len(frame.columns)), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    positive = frame.T.clip(lower=above.min().min(), upper=above.max().max())
    image = axes.imshow(positive, aspect="auto", norm="log")
    axes.set_yticks(range(len(frame.columns)), list(frame.columns), fontsize="x-small")
    axes.set_xlabel("step")
    figure.colorbar(image, label="gradient norm")
    with atomic.replacing(args.out) as temporary:
        figure.savefig(temporary, format=args.out.suffix.lower().lstrip(".") or "png")
    return f"wrote {args.out}"


def _image(out: Path) -> Path:
    return out.with_suffix(".png")


def _wrote(*paths: Path) -> str:
    return f"wrote {' and '.join(map(str, paths))}"


def _write(out: Path, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    handle = io.StringIO()
    writer = csv.DictWriter(handle, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic.write_text(out, handle.getvalue())
