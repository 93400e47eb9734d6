"""`python -m benchmarks.matrix`: a training step in both memory layouts, eager, compiled, as one CUDA graph, masked in
every way there is. It tells which of them the trainer should take on a GPU at hand.

Cells are network x layout x mode. In each the arms run in turn on one batch that lies on the device, with equal zeros
and learning rate 0: the dense step; `weight * mask` in the forward pass; torch's foreach SGD with masks in passes of
their own; the harness's own way; on a GPU also SGD and masks as one loop that torch.compile fuses. A CUDA graph holds
the whole step. Channels-last cells come first; those without time (--limit) or memory are named at the end, and so are
those that fail, with exit code 1.

Gates in every cell, after its steps and before its figures: pruned weights and momenta are 0.0 in all arms that say so,
and the momenta of kept weights agree; at first, the trajectories of foreach and compiled ways in float32.

    python -m benchmarks.matrix --device cuda
    python -m benchmarks.matrix --modes eager
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks import measure, roof
from benchmarks.matrix_arms import (
    COMPILE,
    COMPILED,
    DENSE,
    EAGER,
    FOREACH,
    GRAPH,
    SIEVE,
    arms_of,
    compiled_pass,
    foreach,
    in_turn,
    momentum_apart,
    momentum_norm,
    ready,
)  # fmt: skip
from benchmarks.measure import Pairs, Report
from benchmarks.step import Setting, batch_of, check, leaks
from utils.system import memory
from utils.training import precision

MODES = (EAGER, COMPILE, GRAPH)
LAYOUTS = {"nhwc": True, "nchw": False}
_APART = 0.1
"""Momenta in bfloat16, a network deep: other kernels differ by a few per cent, a lost mask or momentum by far more."""


@dataclass(frozen=True)
class Cell:
    """What one group of arms shares. setting: network, batch, layout; mode: one of MODES."""

    setting: Setting
    mode: str

    @property
    def label(self) -> str:
        """As the rows have it."""
        s, layout = self.setting, "NHWC" if self.setting.channels_last else "NCHW"
        return f"{s.model}, {s.size} px, batch {s.batch}, {str(s.dtype).removeprefix('torch.')}, {layout}, {self.mode}"


def cells(settings: list[Setting], layouts: list[str], modes: list[str]) -> Iterator[Cell]:
    """All of them, by layout, then mode, then network."""
    for layout in layouts:
        for mode in modes:
            for setting in settings:
                yield Cell(replace(setting, channels_last=LAYOUTS[layout]), mode)


def settings_of(device: torch.device, dtype: torch.dtype, density: float) -> list[Setting]:
    """The networks: on a GPU those of `roof`, on a CPU the two of CIFAR."""

    def one(model: str, batch: int, size: int = 32, classes: int = 10) -> Setting:
        return Setting(model, classes, size, batch, density, device, dtype)

    if device.type == "cpu":
        return [one("cifar/resnet20", 128), one("cifar/resnet18", 32)]
    return [
        one("torchvision/resnet50", 256, 224, 1000),
        one("torchvision/resnet18", 1024, 224, 1000),
        one("cifar/resnet18", 512),
    ]


def compare(report: Report, cell: Cell, steps: int, rounds: int) -> float:
    """The rows of a cell; returns the images per second of the harness's own way."""
    device, work = cell.setting.device, steps * cell.setting.batch
    arms = arms_of(cell.setting, cell.mode)
    run = ready(arms, cell.mode)
    before = momentum_norm(arms[DENSE])
    for step in run.values():
        step()
    measure.wait(device)
    # At momentum 0.9 the fourth of equal steps makes 2.71 gradients 3.44; a graph that does nothing makes none.
    grown = momentum_norm(arms[DENSE]) / before
    report.gate(f"{cell.label}: a step moves the momenta", grown > 1.2, f"their norm grew by {grown:.3g}")
    costs = in_turn(run, steps, rounds, device)
    for name in (FOREACH, SIEVE, COMPILED):
        if (arm := arms.get(name)) is not None:
            assert arm.held is not None
            found = leaks(arm, arm.held.masks)
            report.gate(f"{cell.label}, {name}: pruned weights and momenta are 0.0", found == 0, f"{found} are not")
    apart = momentum_apart(arms)
    report.gate(f"{cell.label}: momenta of kept weights agree to {_APART:g}", apart <= _APART, f"apart by {apart:.2g}")
    speed = 0.0
    for name in arms:
        pairs = Pairs(tuple(costs[name]), tuple(costs[DENSE]))
        if name != DENSE:
            row = report.add(measure.faster(cell.label, name, DENSE, pairs, work=work))
            assert row.arm_value is not None
            speed = row.arm_value if name == SIEVE else speed
    return speed


def free(device: torch.device) -> None:
    """Give back what a cell held."""
    batch_of.cache_clear()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def trajectories(report: Report, setting: Setting) -> None:
    """The ways to mask that only this measurement has follow `weight * mask`, in float32."""
    check(report, setting, "SGD", lambda given, _: foreach(given, 0.1), FOREACH)
    if setting.device.type == "cuda":
        check(report, setting, "SGD", lambda given, _: compiled_pass(given, 0.1), COMPILED)


def tell_fastest(report: Report, speeds: dict[Cell, float], bandwidth: float | None) -> None:
    """Per network the fastest cell of the harness's own way, and its share of the roof."""
    for key in dict.fromkeys((cell.setting.model, cell.setting.size) for cell in speeds):
        best = max((cell for cell in speeds if (cell.setting.model, cell.setting.size) == key), key=speeds.__getitem__)
        report.add(measure.figure(f"fastest: {best.label}", SIEVE, speeds[best], "images/s"))
        if bandwidth is not None and key in roof.NETWORKS:
            limit = roof.roof(bandwidth, roof.NETWORKS[key].bytes)
            name = f"fastest: {best.label}: share of {limit:,.0f} images/s, its fused-memory roof"
            report.add(measure.figure(name, SIEVE, speeds[best] / limit, ""))


def main(arguments: list[str]) -> int:
    """Measure and write benchmarks/out/matrix.csv; 1 where a gate fails."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.matrix", description="Layouts, modes, ways to mask.")
    parser.add_argument("--device", default="cpu", help="cpu (one thread) or cuda")
    parser.add_argument("--model", default=None, help="one network alone, with --size, --classes, --batch")
    parser.add_argument("--classes", type=int, default=10, help="of --model (default 10)")
    parser.add_argument("--size", type=int, default=32, help="image side of --model (default 32)")
    parser.add_argument("--batch", type=int, default=32, help="images a step of --model (default 32)")
    parser.add_argument("--density", type=float, default=0.1, help="share of weights kept (default 0.1)")
    parser.add_argument("--precision", default="bfloat16", help="of the forward pass (default bfloat16)")
    parser.add_argument("--layouts", nargs="+", choices=list(LAYOUTS), default=list(LAYOUTS), help="default both")
    parser.add_argument("--modes", nargs="+", choices=["eager", "compile", "graph"], help="default all the device has")
    parser.add_argument("--steps", type=int, default=None, help="steps a run (default 6, on a CPU 2)")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each arm (default 5)")
    parser.add_argument("--limit", type=float, default=480.0, help="seconds after which no cell begins (default 480)")
    parser.add_argument("--out", type=Path, default=measure.OUT, help="where matrix.csv goes")
    given = parser.parse_args(arguments)
    device, start = torch.device(given.device), time.monotonic()
    modes = [mode for mode in MODES if given.modes is None or mode.split()[-1] in given.modes]
    if device.type == "cpu":
        torch.set_num_threads(1)
        memory.keep_freed()
        if given.modes and "graph" in given.modes:
            parser.error("--modes graph: CUDA graphs need --device cuda")
        modes = [mode for mode in modes if mode != GRAPH]
    measure.settle(device)
    dtype = precision.choose(given.precision, device)
    settings = settings_of(device, dtype, given.density)
    if given.model is not None:
        settings = [Setting(given.model, given.classes, given.size, given.batch, given.density, device, dtype)]
    report = Report("matrix", out=given.out)
    bandwidth = None
    if device.type == "cuda":
        bandwidth = roof.copy_bandwidth(device)
        report.add(measure.figure("copies on the device, read and written", "torch", bandwidth / 1e9, "GB/s"))
    torch._dynamo.config.recompile_limit = 64  # networks, layouts and ways to mask share their forward methods
    trajectories(report, settings[-1])
    speeds: dict[Cell, float] = {}
    left, failed = [], []
    for cell in cells(settings, given.layouts, modes):
        free(device)
        if time.monotonic() - start > given.limit:
            left.append(f"{given.limit:g} s were over: {cell.label}")
            continue
        try:
            speeds[cell] = compare(report, cell, given.steps or (2 if device.type == "cpu" else 6), given.rounds)
        except torch.OutOfMemoryError:
            left.append(f"{device.type} has too little memory: {cell.label}")
        except Exception as error:  # of a compiler or a capture: the other cells are worth having
            failed.append(f"{cell.label}: {type(error).__name__}: {f'{error}'.strip().partition(chr(10))[0]}")
        report.save()
    tell_fastest(report, speeds, bandwidth)
    for label in left:
        print(f"not measured, {label}", flush=True)
    for label in failed:
        print(f"failed, {label}", file=sys.stderr, flush=True)
    return report.finish() or int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
