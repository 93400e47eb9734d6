"""`python -m benchmarks.cost`: what an epoch and an iterative run cost on so many GPUs, from the parts of a step.

The model (docs/cost.md derives it, and says where it was held against measurements):

    compute   = max(launch, images of a rank / train rate)
    loading   = images of a rank / (loader rate of a core * cores of a rank)
    reduction = two rings, one within a node and one between nodes: 2 (n - 1) / n * bytes / link + 2 (n - 1) * latency
    step      = max(compute, loading) / overlap + what reduction cannot hide behind the backward pass + packing
    epoch     = steps * step + evaluation + a fixed part
    run       = start + levels * (epochs * epoch + level change)

A part is given on the command line or comes from a preset, whose source is printed with it. Rates are images per
second, links bytes per second, times seconds.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.measure import table_of

BYTES = 4
"""Of a gradient's entry: float32, also under autocast."""


@dataclass(frozen=True)
class Parts:
    """What a step, a loader, a link and a level change cost; the defaults are nothing at all beside the computation.

    train_rate, eval_rate   images/s of one rank whose batch is there already
    launch                  least seconds of a step, whatever its batch (kernel launches)
    loader_rate, cores      images/s of one core, and cores of one rank
    overlap                 share of the slower of step and loader that is reached when both run
    parameters, prunable    entries of a gradient, and those that a mask covers
    local_link, link        bytes/s of a rank within its node; of a node to the others; None: nothing to wait for
    latency                 seconds of a message
    backward                share of a step's computation behind which reduction can hide
    exposed                 bytes of the last bucket, which is ready when the backward pass ends
    pack                    seconds a kept entry costs, where buckets are packed
    epoch, change, start    seconds besides its steps and evaluation: of an epoch, a level change, a run
    """

    train_rate: float
    eval_rate: float
    parameters: int
    prunable: int
    images: int = 1_281_167
    eval_images: int = 50_000
    launch: float = 0.0
    loader_rate: float = float("inf")
    cores: float = 1.0
    overlap: float = 1.0
    local_link: float | None = None
    link: float | None = None
    latency: float = 0.0
    backward: float = 2 / 3
    exposed: float = 25e6
    pack: float = 0.0
    epoch: float = 0.0
    change: float = 0.0
    start: float = 0.0


def compute(parts: Parts, batch: float) -> float:
    """Seconds of forward, backward and update of `batch` images on one rank."""
    return max(parts.launch, batch / parts.train_rate)


def loading(parts: Parts, batch: float) -> float:
    """Seconds in which one rank's cores make `batch` images."""
    return batch / (parts.loader_rate * parts.cores)


def entries(parts: Parts, density: float | None) -> float:
    """Gradient entries a rank sends: all, or the kept ones and those no mask covers where they are packed."""
    return parts.parameters if density is None else parts.parameters - (1 - density) * parts.prunable


def reduction(parts: Parts, ranks: int, per_node: int, density: float | None = None) -> float:
    """Seconds to average one gradient: within each node, then between nodes. density: of packed buckets."""
    size, inside = BYTES * entries(parts, density), min(ranks, per_node)
    rings = ((inside, parts.local_link), (-(-ranks // per_node), parts.link))
    return sum(
        2 * (n - 1) / n * size / link + 2 * (n - 1) * parts.latency for n, link in rings if link is not None and n > 1
    )


def step(parts: Parts, batch: int, ranks: int, per_node: int, density: float | None = None) -> float:
    """Seconds of one optimizer step of `batch` images over all ranks."""
    mine = batch / ranks
    working = compute(parts, mine)
    sending = reduction(parts, ranks, per_node, density)
    last = min(1.0, parts.exposed / (BYTES * parts.parameters)) * sending
    packing = parts.pack * entries(parts, density) if density is not None and ranks > 1 else 0.0
    shown = max(last, sending - parts.backward * working)
    return max(working, loading(parts, mine)) / parts.overlap + shown + packing


def epoch(parts: Parts, batch: int, ranks: int, per_node: int, density: float | None = None) -> float:
    """Seconds of one epoch with its evaluation; images that fill no batch are left out, as the loaders do."""
    steps = parts.images // batch
    evaluation = parts.eval_images / ranks / min(parts.eval_rate, parts.loader_rate * parts.cores)
    return steps * step(parts, batch, ranks, per_node, density) + evaluation + parts.epoch


def run(
    parts: Parts, batch: int, ranks: int, per_node: int, plan: Sequence[float], epochs: int, packed: float = 0.0
) -> float:
    """Seconds of a run that trains `epochs` at each density of `plan`.

    packed: gradients are packed at densities up to this one.
    """
    total = parts.start
    for density in plan:
        share = density if density <= packed else None
        total += epochs * epoch(parts, batch, ranks, per_node, share) + parts.change
    return total


def geometric(levels: int, rate: float = 0.2) -> list[float]:
    """Densities of an iterative run: (1 - rate)^k."""
    return [(1 - rate) ** level for level in range(levels)]


# Presets ----------------------------------------------------------------------------------------------------------

SOURCES = {
    "train_rate": "published: timm's ResNet-50 on an A100 at 224 pixels (2,600); FFCV's ResNet-18 on an A100 at 160 to "
    "192 pixels (10,000), estimated for 224 by the pixels (6,100)",
    "eval_rate": "estimated: three times the training rate, a forward pass being a third of a step",
    "launch": "estimated: eager kernel launches of a step",
    "loader_rate": "measured: benchmarks.loader, 500 px q90 JPEG, resize=ffcv, one core of a shared AMD EPYC",
    "cores": "estimated: 128 cores shared by 8 GPUs",
    "overlap": "estimated: the target set for step and loader running together",
    "local_link": "estimated: NVLink of an A100, 300 GB/s each way, at 0.8",
    "link": "estimated: 100 Gbit/s per node, at 0.9",
    "latency": "estimated",
    "epoch": "estimated: first batches of two loaders, averaged statistics, rows",
    "change": "estimated: score, prune, rewind, write and read weights",
    "start": "estimated: start of the processes and of the loader's kernels",
}
"""Where each preset comes from: published, measured on this repository's code, or estimated."""

_GPU = {
    "loader_rate": 1200.0, "cores": 16.0, "overlap": 0.97, "local_link": 240e9, "link": 11.25e9, "latency": 10e-6,
    "epoch": 1.0, "change": 10.0, "start": 60.0,
}  # fmt: skip

PRESETS = {
    "resnet18": Parts(
        train_rate=6_100.0, eval_rate=18_300.0, launch=0.008, parameters=11_689_512, prunable=11_678_912, **_GPU
    ),
    "resnet50": Parts(
        train_rate=2_600.0, eval_rate=7_800.0, launch=0.020, parameters=25_557_032, prunable=25_502_912, **_GPU
    ),
}  # fmt: skip


# The command ------------------------------------------------------------------------------------------------------


def rows(
    parts: Parts, batches: Sequence[tuple[int, int]], per_node: int, levels: int, epochs: int, packed: float
) -> Iterator[list[str]]:
    """A row per (ranks, global batch)."""
    for ranks, batch in batches:
        seconds = step(parts, batch, ranks, per_node)
        sending = reduction(parts, ranks, per_node)
        whole = run(parts, batch, ranks, per_node, geometric(levels), epochs, packed)
        yield [
            f"{ranks}",
            f"{batch}",
            f"{1e3 * compute(parts, batch / ranks):.2f}",
            f"{1e3 * loading(parts, batch / ranks):.2f}",
            f"{1e3 * sending:.2f}",
            f"{1e3 * seconds:.2f}",
            f"{batch / seconds:,.0f}",
            f"{epoch(parts, batch, ranks, per_node):.1f}",
            f"{whole / 3600:.2f}",
        ]


HEAD = ("ranks", "batch", "compute ms", "loading ms", "reduction ms", "step ms", "images/s", "epoch s", "run h")


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line; every part of a step is an option of its name."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cost", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(PRESETS), default="resnet18", help="preset (default resnet18)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256, 512])
    parser.add_argument("--per-node", type=int, default=8, help="ranks of a node (default 8)")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--batch", type=int, default=1024, help="global batch (default 1024)")
    size.add_argument("--batch-per-rank", type=int, help="instead: grows the global batch with the ranks")
    parser.add_argument("--levels", type=int, default=25, help="of the run, densities 0.8^k (default 25)")
    parser.add_argument("--epochs", type=int, default=90, help="of a level (default 90)")
    parser.add_argument("--packed-below", type=float, default=0.0, help="pack gradients up to this density (default 0)")
    for field in dataclasses.fields(Parts):
        option = "--" + field.name.replace("_", "-")
        kind = int if field.name in ("parameters", "prunable", "images", "eval_images") else float
        parser.add_argument(option, type=kind, help=SOURCES.get(field.name, "see the module's text"))
    given = parser.parse_args(arguments)
    for ranks in given.ranks:
        batch = given.batch_per_rank * ranks if given.batch_per_rank else given.batch
        if ranks < 1 or batch < ranks:
            parser.error(f"--batch {batch}: less than one image for each of {ranks} ranks")
    for field in dataclasses.fields(Parts):
        value = getattr(given, field.name)
        if value is not None and (value < 0 or (value == 0 and field.name in POSITIVE)):
            parser.error(f"--{field.name.replace('_', '-')} {value}: give a positive number")
    return given


POSITIVE = {"train_rate", "eval_rate", "loader_rate", "cores", "overlap", "local_link", "link", "parameters"}
"""Parts that something is divided by."""


def main(arguments: list[str]) -> int:
    """Print the parts with their sources, and the table."""
    given = parse(arguments)
    named = {field.name: getattr(given, field.name) for field in dataclasses.fields(Parts)}
    changed = {name: value for name, value in named.items() if value is not None}
    parts = dataclasses.replace(PRESETS[given.model], **changed)
    for field in dataclasses.fields(Parts):
        source = "given" if field.name in changed else SOURCES.get(field.name, "")
        print(f"{field.name} = {getattr(parts, field.name):g}" + (f"  ({source})" if source else ""))
    batches = [(n, given.batch_per_rank * n if given.batch_per_rank else given.batch) for n in given.ranks]
    lines = rows(parts, batches, given.per_node, given.levels, given.epochs, given.packed_below)
    print(f"\n{given.levels} levels of {given.epochs} epochs\n" + table_of(HEAD, lines))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
