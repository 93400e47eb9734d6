"""`python -m benchmarks.trainer`: a level's training against the bare loop, and against the published harness's step.

The level is the trainer's own: the `device` loader with augmentation, losses and accuracies, schedule, looks at the
losses and at signals, masks at density 0.1. The bare loop is forward, backward and optimizer on one batch that lies on
the device, with the same masks; the published harness's step, rebuilt in `benchmarks.published`, has the same batch to
itself: NCHW order, weight * mask in every forward pass, loss and accuracy read back at every step. All in the same
precision, at the same masks; the published step in a process of its own. The level also with training.compile. Costs
are CPU time of one thread, on a GPU wall time. On a GPU also the level's images per second, and their share of what
the memory of that GPU allows (`benchmarks.roof`).

    python -m benchmarks.trainer
    python -m benchmarks.trainer --device cuda
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path

import torch

from benchmarks import measure, roof
from benchmarks.measure import Report
from benchmarks.step import check, fits, ours
from benchmarks.trainer_arms import LEVEL, PUBLISHED, Process, Work
from utils.training import precision


def compare(report: Report, work: Work, rounds: int, target: str, bandwidth: float | None = None) -> None:
    """The rows of one network. bandwidth: of the device's memory, for the share of the roof; None leaves that out."""
    label = f"{work.model}, {work.size} px, batch {work.batch}, {work.dtype}"
    name = "sieve, a level" + (", compiled" if work.compile else "")
    with Process(LEVEL, work) as level, Process(PUBLISHED, work) as published:
        level.cost()
        (found,) = level.ask("leaks")
        report.gate(f"{label}: after an epoch, pruned weights and optimizer state are 0.0", found == 0, f"{found:.0f}")
        if not work.compile:
            pairs = measure.interleave(level.cost, level.bare, rounds)
            report.add(measure.faster(f"level, {label}", name, "bare loop", pairs, ">= 0.95"))
        (waited,) = level.ask("waited")
        report.add(measure.figure(f"level, {label}: largest share of an epoch waiting for data", name, waited, ""))
        pairs = measure.interleave(level.cost, published.cost, rounds)
        row = report.add(measure.faster(f"step, {label}", name, "published harness's step", pairs, target))
    network = roof.NETWORKS.get((work.model, work.size))
    if bandwidth is not None and network is not None:
        assert row.arm_value is not None
        roof.add_rows(report, label, name, network, row.arm_value, bandwidth)


def plan(device: torch.device, dtype: torch.dtype, steps: int | None) -> list[tuple[Work, str]]:
    """What is measured, with the ratio wanted against the published step."""
    name = str(dtype).removeprefix("torch.")

    def one(model: str, batch: int, default: int, size: int = 32, classes: int = 10, compile: bool = False) -> Work:
        return Work(model, classes, size, batch, name, str(device), steps or default, compile)

    if device.type == "cpu":
        return [
            row
            for compile in (False, True)
            for row in (
                (one("cifar/resnet20", 128, 12, compile=compile), ">= 1.4"),
                (one("cifar/resnet18", 64, 6, compile=compile), ">= 1.3"),
            )
        ]
    found = []
    for compile in (False, True):
        found += [
            (one("torchvision/resnet50", 256, 40, 224, 1000, compile), ">= 1.8"),
            (one("torchvision/resnet18", 1024, 40, 224, 1000, compile), ">= 1.5"),
            (one("cifar/resnet18", 512, 40, compile=compile), ""),
        ]
    return found


def main(arguments: list[str]) -> int:
    """Measure and write benchmarks/out/trainer.csv; 1 where a gate fails."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trainer", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu (one thread) or cuda")
    parser.add_argument("--precision", default="bfloat16", help="of the forward pass (default bfloat16)")
    parser.add_argument("--steps", type=int, default=None, help="steps a run (default 12 and 6, on a GPU 40)")
    parser.add_argument("--rounds", type=int, default=9, help="pairs a row (default 9)")
    parser.add_argument("--out", type=Path, default=measure.OUT, help="where trainer.csv goes")
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    dtype = precision.choose(given.precision, device)
    report = Report("trainer", out=given.out)
    works = plan(device, dtype, given.steps)
    for work in (work for work, _ in works if not work.compile):
        one_pass = functools.partial(ours, one_pass=fits(work.setting, "SGD"))
        check(report, work.setting, "SGD", one_pass, work.model)
    bandwidth = None
    if device.type == "cuda":
        bandwidth = roof.copy_bandwidth(device)
        report.add(measure.figure("copies on the device, read and written", "torch", bandwidth / 1e9, "GB/s"))
        torch.cuda.empty_cache()  # the arms live in processes of their own
    for work, target in works:
        compare(report, work, given.rounds, target, bandwidth)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
