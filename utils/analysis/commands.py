"""The analyses as `python -m utils.reporting` calls them: arguments to files and one line."""

from __future__ import annotations

import argparse
import csv
import io
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

from utils import files
from utils.analysis import activations, connectivity, mask_maps
from utils.analysis.level import OpenLevel, open_level
from utils.data.protocol import Loader
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
    weights = RunDir(Path(args.runs[1])).level(second).weights
    with open_level(args.runs[0], args.level) as level:
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

    frame = pd.read_csv(path, index_col="step")
    figure = Figure(figsize=(6.4, 2.5 + 0.15 * len(frame.columns)), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    positive = frame.T.clip(lower=frame[frame > 0].min().min())
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
