"""`python -m benchmarks.select`: the exact k-th score of a whole network, and the masks made from it.

Scores of 25.5 million weights (ResNet-50's) and of 100 million, in layers, the best tenth kept; float32, and float64 as
SynFlow's. Peers: torch.kthvalue and torch.sort, on the scores already end to end, and numpy's partition of a copy. The
masks' peer is the usual way: kthvalue, then a comparison per layer, which keeps too many or too few where scores tie.

One thread; costs are CPU time, so that what else the machine does counts as little as can be.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks import measure
from benchmarks.measure import Report
from utils.pruning.kth import kth
from utils.pruning.select import Layer, Pool, priority, top

LAYERS = 54
KEPT = 0.1
GATE_SIZE = 300_000
LIMITS = {25_500_000: "<= 90 ms", 100_000_000: "<= 260 ms"}


class Case:
    """`size` scores in LAYERS layers, of which a share KEPT of the live ones stays.

    levels: draws so many values per standard deviation, 0 for as many as there are. live: the share of live weights.
    """

    def __init__(self, size: int, dtype: type = np.float32, levels: int = 0, live: float = 1.0) -> None:
        rng = np.random.default_rng(0)
        flat = np.abs(rng.standard_normal(size, dtype=np.float32)).astype(dtype)
        self.flat = np.floor(flat * levels) if levels else flat
        self.live = np.ones(size, dtype=bool) if live == 1.0 else rng.random(size) < live
        parts = zip(np.array_split(self.flat, LAYERS), np.array_split(self.live, LAYERS), strict=True)
        self.layers = tuple(Layer(f"{i}", scores.shape, scores, mask, i) for i, (scores, mask) in enumerate(parts))
        self.alive = sum(layer.alive for layer in self.layers)
        self.keep = int(self.alive * KEPT)
        self.rank = self.alive - self.keep

    def threshold(self) -> float:
        """Ours; all weights live, as for the peers."""
        return float(kth([(layer.scores, None) for layer in self.layers], self.alive, self.rank))

    def kthvalue(self) -> float:
        """Torch's, which counts from 1."""
        return float(torch.kthvalue(torch.from_numpy(self.flat), self.rank + 1).values)

    def sort(self) -> float:
        """From a sort of all."""
        return float(torch.sort(torch.from_numpy(self.flat)).values[self.rank])

    def partition(self) -> float:
        """From numpy's partition of a copy."""
        return float(np.partition(self.flat, self.rank)[self.rank])

    def masks(self) -> dict[str, torch.Tensor]:
        """Ours: exactly `keep` weights."""
        return top(Pool(self.layers, self.keep))

    def usual_masks(self) -> list[torch.Tensor]:
        """What scores no less than kthvalue's threshold, however many that are."""
        threshold = self.kthvalue()
        return [torch.from_numpy(layer.scores) >= threshold for layer in self.layers]

    def sorted_mask(self) -> np.ndarray:
        """The mask from an order of all weights: live ones first, then by score, priority and place."""
        order = np.concatenate([priority(layer.key, np.arange(layer.size)) for layer in self.layers])
        mask = np.zeros(len(self.flat), dtype=bool)
        mask[np.lexsort((order, -self.flat, ~self.live))[: self.keep]] = True
        return mask


def check(report: Report, size: int) -> None:
    """The gates: the masks of a sort to the weight, exact counts, with and without ties and dead weights."""
    equal = Case(size)
    equal.flat[:] = 1.5  # the layers are views of it
    cases = {
        "all scores different": Case(size),
        "float64, a tenth alive": Case(size, np.float64, live=0.1),
        "a dozen values, half alive": Case(size, levels=3, live=0.5),
        "all scores equal": equal,
    }
    for name, case in cases.items():
        mask = np.concatenate([part.numpy() for part in case.masks().values()])
        wrong = int(np.count_nonzero(mask != case.sorted_mask()))
        report.gate(f"masks as from a sort: {name}", wrong == 0, f"{wrong} of {size} differ")
        report.gate(f"exact count: {name}", int(mask.sum()) == case.keep, f"{mask.sum()} of {case.keep} kept")


def compare(report: Report, name: str, case: Case, rounds: int, limit: str = "") -> None:
    """The rows of one size: the threshold, then the masks. limit: what the threshold may cost."""
    agree = case.threshold() == case.kthvalue()
    report.gate(f"{name}: kthvalue finds the same score", agree, f"{case.threshold()!r}")
    pairs = interleave(case.threshold, case.kthvalue, rounds)
    row = report.add(measure.quicker(f"{name}, k-th score", "sieve", "torch.kthvalue", pairs, ">= 4.5"))
    assert row.arm_value is not None
    report.add(measure.figure(f"{name}, k-th score", "sieve", row.arm_value, "ms", limit))
    pairs = interleave(case.threshold, case.partition, rounds)
    report.add(measure.quicker(f"{name}, k-th score", "sieve", "numpy.partition", pairs))
    pairs = interleave(case.masks, case.usual_masks, rounds)
    report.add(measure.quicker(f"{name}, masks", "sieve", "torch.kthvalue, then >=", pairs, ">= 2.8"))


def compare_sort(report: Report, name: str, case: Case, rounds: int) -> None:
    """The row against a sort, which is slow enough for one size."""
    pairs = interleave(case.threshold, case.sort, rounds)
    report.add(measure.quicker(f"{name}, k-th score", "sieve", "torch.sort", pairs, ">= 35"))


def interleave(arm: Callable[[], object], peer: Callable[[], object], rounds: int) -> measure.Pairs:
    """Both in turn, in CPU time."""

    def timed(work: Callable[[], object]) -> float:
        return measure.cost(lambda: work() and None, time.process_time)

    return measure.interleave(lambda: timed(arm), lambda: timed(peer), rounds)


def main(arguments: list[str]) -> int:
    """Measure and write benchmarks/out/select.csv; 1 where a gate fails."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.select", description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=float, nargs="+", default=[25.5e6, 100e6], help="weights (25.5e6 100e6)")
    parser.add_argument("--rounds", type=int, default=9, help="pairs a row (default 9)")
    parser.add_argument("--sort-rounds", type=int, default=3, help="pairs against a sort of the first size (default 3)")
    parser.add_argument("--out", type=Path, default=measure.OUT, help="where select.csv goes")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    report = Report("select", out=given.out)
    check(report, GATE_SIZE)
    for number, size in enumerate(map(int, given.sizes)):
        name, case = f"{size / 1e6:g} million", Case(size)
        compare(report, name, case, given.rounds, LIMITS.get(size, ""))
        if number == 0:
            compare_sort(report, name, case, given.sort_rounds)
            compare(report, f"{name} in float64", Case(size, np.float64), given.rounds)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
