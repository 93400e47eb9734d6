"""`python -m benchmarks.collapse`: which layers pruning at initialisation empties, and whether a path is left.

Prunes freshly initialised networks by several methods to several densities and writes, for each, the layers without a
weight, the effective density (kept weights on a path from input to output) and whether any path is left, as
collapse.csv (names of the empty layers in full) and collapse.md under --out. SNIP scores --images standard normal
images with classes in turn, so no data set is needed: what it shows holds for such images. SynFlow takes its 100
rounds.

What collapse.csv holds already is not measured again, so the command can be stopped and given again; delete the file to
start anew. One thread is used unless OMP_NUM_THREADS says otherwise.

    python -m benchmarks.collapse --networks cifar/resnet18 cifar/vgg16_bn
    python -m benchmarks.collapse --networks torchvision/resnet50 --densities 0.1 0.01
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from utils import models
from utils.masks import Masks
from utils.params.pruning import Pruning
from utils.pruning import PruningHarness, paths
from utils.pruning.criteria import Scores
from utils.system import atomic

DENSITIES = (0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001)
SEED = 0


@dataclass(frozen=True)
class Network:
    """A model's classes and the side of its square images."""

    classes: int
    side: int


NETWORKS = {
    "cifar/resnet18": Network(10, 32),
    "cifar/vgg16_bn": Network(10, 32),
    "torchvision/resnet50": Network(1000, 64),
}

METHODS = {
    "random, uniform": ("random", "uniform"),
    "random, ERK": ("random", "erk"),
    "random, balanced": ("random", "balanced"),
    "magnitude": ("magnitude", "global"),
    "SNIP": ("snip", "global"),
    "SynFlow": ("synflow", "global"),
}
"""Method -> its criterion and allocation."""


def noise(network: Network, images: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """One batch of standard normal images, classes in turn."""
    generator = torch.Generator().manual_seed(SEED)
    batch = torch.randn(images, 3, network.side, network.side, generator=generator)
    return [(batch, torch.arange(images) % network.classes)]


def harness_of(network: Network, method: str, density: float) -> PruningHarness:
    """The pruning harness of one row."""
    criterion, allocation = METHODS[method]
    section = Pruning(criterion=criterion, allocation=allocation, density=density)
    return PruningHarness(section, seed=SEED, input_shape=(3, network.side, network.side))


def masks_of(
    model: nn.Module, network: Network, method: str, densities: Sequence[float], images: int
) -> Iterator[tuple[float, Masks]]:
    """The masks of every density, in turn; methods of one round score once for all of them."""
    scores: Scores | None = None
    batches = noise(network, images)
    for density in densities:
        harness = harness_of(network, method, density)
        start = harness.start(model)
        if harness.rounds > 1:
            yield density, harness.prune(model, start, density, batches).masks
            continue
        scores = harness.score(model, start, batches) if scores is None else scores
        yield density, harness.select(scores, start, density)


def measure(model: nn.Module, network: Network, masks: Masks) -> dict[Hashable, object]:
    """What a mask leaves of the network."""
    found = paths.effective(model, masks, (3, network.side, network.side))
    return {
        "kept": masks.kept,
        "total": masks.total,
        "effective_density": found.density,
        "connected": found.connected,
        "empty_layers": len(found.dead),
        "layers": len(masks),
        "empty": " ".join(found.dead),
    }


def table(frame: pd.DataFrame, command: str) -> str:
    """A row per network and method, a column per density, as markdown: `empty layers (effective density)`."""
    densities = sorted(frame["density"].unique(), reverse=True)
    lines = [
        "| network | method | " + " | ".join(f"{density:g}" for density in densities) + " |",
        "|---|---|" + "---|" * len(densities),
    ]
    for (network, method), rows in frame.groupby(["network", "method"], sort=False):
        cells = {row["density"]: _cell(row) for row in rows.to_dict("records")}
        lines.append(f"| {network} | {method} | " + " | ".join(cells.get(d, "") for d in densities) + " |")
    legend = "Empty layers, effective density in brackets; **cut**: no path is left from input to output."
    return f"{command}\n\n{legend}\n\n" + "\n".join(lines) + "\n"


def _cell(row: Mapping[Hashable, object]) -> str:
    return f"{row['empty_layers']} ({row['effective_density']:.2g})" + ("" if row["connected"] else " **cut**")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is missing, then write the table; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.collapse")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--densities", nargs="+", type=float, default=list(DENSITIES))
    parser.add_argument("--images", type=int, default=100, help="images SNIP scores on")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out"), help="folder of the CSV and the table")
    args = parser.parse_args(words)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    csv, text = args.out / "collapse.csv", args.out / "collapse.md"
    args.out.mkdir(parents=True, exist_ok=True)
    rows = pd.read_csv(csv, keep_default_na=False).to_dict("records") if csv.is_file() else []
    for name in args.networks:
        network = NETWORKS[name]
        model = models.build(name, network.classes, image_size=network.side, seed=SEED)
        for method in args.methods:
            known = [row["density"] for row in rows if (row["network"], row["method"]) == (name, method)]
            missing = [density for density in args.densities if density not in known]
            begun = time.monotonic()
            for density, masks in masks_of(model, network, method, missing, args.images):
                row: dict[Hashable, object] = {"network": name, "method": method, "density": density}
                row |= measure(model, network, masks)
                rows.append(row)
                atomic.write_text(csv, pd.DataFrame(rows).to_csv(index=False, lineterminator="\n"))
                seconds, begun = time.monotonic() - begun, time.monotonic()
                told = (name, method, f"{density:g}", _cell(row), row["empty"], f"{seconds:.0f} s")
                print("  ".join(map(str, told)), flush=True)
    shown = table(pd.DataFrame(rows), f"`{shlex.join(['python', '-m', 'benchmarks.collapse', *words])}`")
    atomic.write_text(text, shown)
    print(f"\n{shown}\nwrote {csv} and {text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
