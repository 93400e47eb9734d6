"""`python -m benchmarks.allreduce`: bytes and time of packed gradient reduction against DDP's own, over densities.

Two ranks over gloo, ResNet-18's weights for CIFAR in random masks, and gradients that are there already. What is timed
is a backward pass of DDP that has only to copy gradients into buckets, mask and reduce them (the slower of the ranks),
less the median of one that sends nothing: what is left is communication, packing included. The ranks live in two
network namespaces joined by a cable of a given rate, whose counters tell the bytes; then on one host, over loopback.
The density from which packing costs more than it saves is read off between the densities measured.

Namespaces need root and iproute2; without them only loopback is measured, and one line says so.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import hosts, measure
from benchmarks.hosts import Host
from benchmarks.measure import Pairs, Report, cheaper, figure
from benchmarks.processes import Ranks

DENSITIES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
ARMS = "benchmarks.allreduce_arms"
AT = 0.1
"""Density of the targets."""
LEAST = 1e-4
"""Seconds of communication a busy machine's noise may leave at least."""


def check(report: Report, ranks: Ranks) -> None:
    """The gates: DDP's gradients to the bit, zeros where pruned, no entry too many, both ranks alike."""
    for density in (AT, 0.5):
        found = [list(column) for column in zip(*ranks.ask("check", f"{density}"), strict=True)]
        words = ("packed gradients are DDP's", "pruned gradients are +0.0", "entries sent are kept + unmasked ones")
        for what, wrong in zip((*words, "ranks hold one digest"), found, strict=True):
            report.gate(f"density {density}: {what}", not any(wrong), f"{wrong} wrong, by rank")


def sweep(report: Report, link: str, ranks: Ranks, densities: Sequence[float], rounds: int, target: str = "") -> None:
    """The rows of communication time over one link."""
    ratios = []
    for density in densities:
        pairs = communication(ranks, density, rounds)
        wanted = target if density == AT else ""
        row = report.add(cheaper(f"{link}, density {density}: time", "packed", "DDP", pairs, wanted, "ms"))
        assert row.ratio is not None
        ratios.append((density, row.ratio))
    report.add(figure(f"{link}: packing pays up to", "packed", pays_up_to(ratios), "density"))


def communication(ranks: Ranks, density: float, rounds: int) -> Pairs:
    """Seconds of backward passes beyond those of one that sends nothing, taken in turn with them."""

    def step(arm: str) -> float:
        return max(seconds for (seconds,) in ranks.ask("step", arm, f"{density}"))

    nothing: list[float] = []

    def packed() -> float:
        nothing.append(step("none"))
        return step("packed")

    pairs = measure.interleave(packed, lambda: step("dense"), rounds)
    rest = statistics.median(nothing[1:])
    return Pairs(*(tuple(max(seconds - rest, LEAST) for seconds in side) for side in (pairs.arm, pairs.peer)))


def pays_up_to(ratios: Sequence[tuple[float, float]]) -> float:
    """The density at which the ratio of times first passes 1, between those measured; 0 where it begins above.

    The highest one measured where it never does.

    ratios: (density, packed over dense) in rising order of density.
    """
    before: tuple[float, float] | None = None
    for density, ratio in ratios:
        if ratio >= 1.0:
            if before is None:
                return 0.0
            low, least = before
            return low + (density - low) * (1.0 - least) / (ratio - least)
        before = density, ratio
    return before[0] if before is not None else 0.0


def count_bytes(report: Report, pair: tuple[Host, Host], ranks: Ranks, densities: Sequence[float], rounds: int) -> None:
    """The rows of bytes on the cable, of both directions."""

    def counted(arm: str, density: float) -> Callable[[], float]:
        def run() -> float:
            before = sum(host.sent() for host in pair)
            ranks.ask("step", arm, f"{density}")
            return float(sum(host.sent() for host in pair) - before)

        return run

    for density in densities:
        pairs: Pairs = measure.interleave(counted("packed", density), counted("dense", density), rounds)
        wanted = "<= 0.15" if density == AT else ""
        report.add(cheaper(f"density {density}: bytes on the cable", "packed", "DDP", pairs, wanted, "MB"))


def main(arguments: list[str]) -> int:
    """Measure and write benchmarks/out/allreduce.csv; 1 where a gate fails."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.allreduce", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="pairs a row (default 7)")
    parser.add_argument(
        "--rates", nargs="+", default=["1gbit", "10gbit"], help="of the cable (default 1gbit 10gbit); the first counts"
    )
    parser.add_argument("--densities", type=float, nargs="+", default=DENSITIES, help="in rising order")
    parser.add_argument("--out", type=Path, default=measure.OUT, help="where allreduce.csv goes")
    given = parser.parse_args(arguments)
    densities: Sequence[float] = given.densities
    report = Report("allreduce", out=given.out)
    try:
        with hosts.pair() as pair:
            place = {"address": pair[0].address, "interfaces": [host.interface for host in pair]}
            with Ranks(ARMS, prefixes=[host.prefix for host in pair], **place) as ranks:
                check(report, ranks)
                count_bytes(report, pair, ranks, densities, 3)
                for number, rate in enumerate(given.rates):
                    for host in pair:
                        host.slow_down(rate)
                    sweep(report, rate, ranks, densities, given.rounds, "" if number else "<= 0.3")
    except hosts.Unavailable as reason:
        print(f"no cable is measured, loopback alone: {reason}", flush=True)
    with Ranks(ARMS, prefixes=((), ()), address="127.0.0.1", interfaces=("lo", "lo")) as ranks:
        check(report, ranks)
        sweep(report, "loopback", ranks, densities, given.rounds)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
