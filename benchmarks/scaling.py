"""`python -m benchmarks.scaling`: a training step of two processes in masks, against the dense one, and its mask bytes.

ResNet-18 for CIFAR in bfloat16 over gloo, random masks of density 0.1, whole steps: forward, backward, reduction, SGD
with momentum. All arms have the same zeros and keep them (learning rate 0 while timed), for zeros alone change the time
of a step. The published harness's way is rebuilt here: masks are float32 buffers that DDP broadcasts before every
forward pass, which multiplies by them. Bytes are those of a loopback of the two processes' own, less the dense arm's.

Bytes need a network namespace, so root and iproute2; without them one line says that they are not counted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks import hosts, measure
from benchmarks.hosts import Host
from benchmarks.measure import Report, cheaper, figure
from benchmarks.processes import Ranks

ARMS = "benchmarks.scaling_arms"


def check(report: Report, ranks: Ranks) -> float:
    """The gates; returns what the masks weigh in bytes as float32."""
    masked, published, violations, apart, weight = (max(column) for column in zip(*ranks.ask("check"), strict=True))
    report.gate("ranks hold equal weights: masked", masked == 0)
    report.gate("ranks hold equal weights: published", published == 0)
    report.gate("pruned weights and optimizer state are +0.0", violations == 0)
    report.gate("kept weights are those of a masked forward pass to 1e-6", apart <= 1e-6, f"{apart:.1e} apart")
    return weight


def step(ranks: Ranks, arm: str, steps: int) -> Callable[[], float]:
    """Seconds of one step, of the slower rank."""
    return lambda: max(seconds for (seconds,) in ranks.ask("step", arm, f"{steps}")) / steps


def count_bytes(report: Report, host: Host, ranks: Ranks, weight: float) -> None:
    """Bytes a step of the masked arms sends beyond the dense one's, of both ranks."""
    per_step = {}
    for arm in ("dense", "masked", "published"):
        before = host.sent()
        ranks.ask("step", arm, "4")
        per_step[arm] = (host.sent() - before) / 4
    report.add(figure("bytes of a dense step", "dense DDP", per_step["dense"] / 1e6, "MB"))
    for arm, target in (("masked", "<= 0.01"), ("published", "")):
        more = (per_step[arm] - per_step["dense"]) / weight
        report.add(figure("bytes beyond the dense step, over those of float32 masks", arm, more, "", target))


def measured(report: Report, ranks: Ranks, host: Host | None, rounds: int) -> None:
    """All gates and rows of one group of ranks."""
    weight = check(report, ranks)
    if host is not None:
        count_bytes(report, host, ranks, weight)
    for arm, target in (("masked", "<= 1.02"), ("published", "")):
        pairs = measure.interleave(step(ranks, arm, 2), step(ranks, "dense", 2), rounds)
        report.add(cheaper("step of two processes", f"{arm} DDP", "dense DDP", pairs, target, "ms"))


def main(arguments: list[str]) -> int:
    """Measure and write benchmarks/out/scaling.csv; 1 where a gate fails."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="cifar/resnet18", help="network (default cifar/resnet18)")
    parser.add_argument("--batch", type=int, default=16, help="images per process (default 16)")
    parser.add_argument("--rounds", type=int, default=15, help="pairs a row (default 15)")
    parser.add_argument("--out", type=Path, default=measure.OUT, help="where scaling.csv goes")
    given = parser.parse_args(arguments)
    report = Report("scaling", out=given.out)
    words = (ARMS, given.model, f"{given.batch}")
    place = {"address": "127.0.0.1", "interfaces": ("lo", "lo")}
    try:
        with hosts.alone() as host, Ranks(*words, prefixes=(host.prefix, host.prefix), **place) as ranks:
            measured(report, ranks, host, given.rounds)
    except hosts.Unavailable as reason:
        print(f"bytes are not counted: {reason}", flush=True)
        with Ranks(*words, prefixes=((), ()), **place) as ranks:
            measured(report, ranks, None, given.rounds)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
