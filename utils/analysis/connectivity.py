"""Linear mode connectivity (Frankle et al. 2020): loss and error along the straight line between two networks.

Meant for children of one checkpoint that were trained on with different data orders (`data.order_seed`). BatchNorm
statistics are not interpolated: they are estimated anew at every point, from training images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils import files
from utils.system import atomic
from utils.system.errors import UserError
from utils.tasks import Batch

State = Mapping[str, Tensor]
COLUMNS = ("share", "loss", "acc", "error", "train_loss", "train_acc", "train_error")


@torch.no_grad()
def estimate_statistics(model: nn.Module, batches: Iterable[Batch]) -> None:
    """Set the running statistics of every BatchNorm to the mean of its batches' own; the rest of the model stays.

    Every batch counts alike. Nothing is done to a model without BatchNorm. Raises UserError when there is no batch.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    norms = [norm for norm in norms if norm.running_mean is not None]
    if not norms:
        return
    flags = [(module, module.training) for module in model.modules()]
    momenta = [norm.momentum for norm in norms]
    seen = 0
    try:
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a cumulative mean
            norm.train()
        for images, _ in batches:
            model(images)
            seen += 1
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, training in flags:
            module.training = training
    if not seen:
        raise UserError("connectivity: there are no training images to estimate BatchNorm statistics from")


@torch.no_grad()
def between(a: State, b: State, share: float) -> dict[str, Tensor]:
    """(1 - share) * a + share * b for floating-point tensors, in float64 and rounded once; the others are a's.

    share 0 and 1 give a and b bit for bit. Raises UserError for states of different models.
    """
    for name in [*a, *b]:
        if name not in a or name not in b or a[name].shape != b[name].shape:
            raise UserError(f"connectivity: {name!r} differs in shape or is missing; compare weights of one model")
    found = {}
    for name, one in a.items():
        other = b[name]
        if not one.is_floating_point() or share == 0.0:
            found[name] = one.clone()
        elif share == 1.0:
            found[name] = other.clone()
        else:
            mixed = (1.0 - share) * one.double() + share * other.double()
            found[name] = mixed.to(one.dtype)
    return found


def connectivity_rows(
    model: nn.Module,
    a: State,
    b: State,
    points: int,
    training: Callable[[], Iterable[Batch]],
    test: Callable[[nn.Module], dict[str, float]],
    train: Callable[[nn.Module], dict[str, float]],
) -> list[dict[str, float]]:
    """A row per point from a (share 0) to b (share 1), both ends included.

    training: a fresh pass over the images for BatchNorm. test, train: evaluate the model in eval mode, giving `loss`
    and `acc` (percent). error is 100 - acc. The model is left at b.
    """
    if points < 2:
        raise UserError(f"--points={points}: a line needs its two ends; give 2 or more")
    rows = []
    for number in range(points):
        share = number / (points - 1)
        files.put_weights(model, between(a, b, share), "connectivity")
        estimate_statistics(model, training())
        model.eval()
        seen, known = test(model), train(model)
        row = {"share": share, "loss": seen["loss"], "acc": seen["acc"], "error": 100.0 - seen["acc"]}
        row |= {"train_loss": known["loss"], "train_acc": known["acc"], "train_error": 100.0 - known["acc"]}
        rows.append(row)
    return rows


def barrier(rows: list[dict[str, float]], column: str = "error") -> float:
    """Instability: the highest point of `column` above the mean of its two ends."""
    return max(row[column] for row in rows) - (rows[0][column] + rows[-1][column]) / 2


def plot_connectivity(rows: list[dict[str, float]], out: Path) -> Path:
    """Test and training error along the line, into the image `out`; returns its path."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    shares = [row["share"] for row in rows]
    labels: dict[str, Any] = {"error": "test", "train_error": "training"}
    for column, label in labels.items():
        barred = f"{label}, barrier {barrier(rows, column):.2f}"
        axes.plot(shares, [row[column] for row in rows], marker="o", markersize=4, label=barred)
    axes.set_xlabel("share of the way from the first network to the second")
    axes.set_ylabel("error (%)")
    axes.grid(True, alpha=0.3)
    axes.legend(fontsize="small")
    with atomic.replacing(out) as temporary:
        figure.savefig(temporary, format=out.suffix.lower().lstrip(".") or "png")
    return out
