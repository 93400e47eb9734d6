"""`python -m benchmarks.trainer`: a level's training against the bare loop, and against the published harness's step.

The level is the trainer's own: the `device` loader with augmentation, losses and accuracies, schedule, looks at the
losses and at signals, masks at density 0.1. The bare loop is forward, backward and optimizer on one batch that lies on
the device, with the same masks; the published harness's step, rebuilt in `benchmarks.published`, has the same batch to
itself: NCHW order, weight * mask in every forward pass, loss and accuracy read back at every step. All in the same
precision, at the same masks. Costs are this process's CPU time (one thread), on a GPU wall time.

    python -m benchmarks.trainer
    python -m benchmarks.trainer --device cuda
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks import measure
from benchmarks.measure import Report
from benchmarks.published import harness_step
from benchmarks.step import Arm, Setting, batch_of, check, fits, leaks, network, optimizer_of, ours
from utils import params, sparsity
from utils.data import Loaders
from utils.data.device_loader import DeviceLoader
from utils.data.order import Shard
from utils.data.spec import DataSpec
from utils.params.load import build as build_params
from utils.system.console import Console
from utils.system.distributed import World
from utils.tasks.classification import ImageClassification
from utils.training import precision
from utils.training.progress import Stage
from utils.training.trainer import Trainer

RATE = 1e-4
"""Learning rate of all arms: weights move, and stay finite on noise."""


class Noise:
    """A `Source` of random images: no arm's time depends on what they show."""

    def __init__(self, count: int, side: int, classes: int) -> None:
        self.pixels = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
        self.labels, self.classes = np.arange(count) % classes, [str(number) for number in range(classes)]

    def __len__(self) -> int:
        return len(self.pixels)

    def image(self, index: int) -> Image.Image:
        """The image at `index`."""
        return Image.fromarray(self.pixels[index])

    def digest(self) -> str:
        """Not a file: named by what makes it."""
        return "noise"


def loaders_of(setting: Setting, steps: int) -> Loaders:
    """A training split of `steps` batches on the device, cropped and mirrored, and a test split of four images."""
    spec = DataSpec(
        name="folder", directory=Path("noise"), betons=Path("noise"), classes=setting.classes,
        image_size=setting.size, eval_size=setting.size, max_resolution=setting.size, write_mode="raw", augment="crop",
        flip=True, mean=(127.5,) * 3, std=(73.6,) * 3, eval_ratio=1.0, data=params.Data(name="folder"),
    )  # fmt: skip

    def loader(count: int, training: bool) -> DeviceLoader:
        source = Noise(count, setting.size, setting.classes)
        return DeviceLoader(
            spec, source, np.arange(count), Shard(0, 1, setting.batch, 1), setting.device, training=training,
            order_seed=0, channels_last=setting.channels_last, workers=1, eval_batch=4,
        )  # fmt: skip

    def none(*_: Any) -> Any:
        raise NotImplementedError("nothing is scored here")

    return Loaders(loader(steps * setting.batch, True), None, loader(4, False), spec, {}, "device", none)


class Level:
    """The trainer at one masked network; call it for an epoch of `steps` steps (and an evaluation of four images)."""

    def __init__(self, setting: Setting, steps: int, compile: bool = False) -> None:
        model, masks = network(setting)
        name = str(setting.dtype).removeprefix("torch.")
        keys = {"precision": name, "batch_size": setting.batch, "compile": compile}
        built = build_params({"levels.count": 1, **{f"training.{key}": value for key, value in keys.items()}})
        task = ImageClassification(setting.classes)
        self.trainer = Trainer(
            model, task, loaders_of(setting, steps), built.training, built.distributed,
            seed=0, world=World(), device=setting.device, console=Console(False),
        )  # fmt: skip
        self.optimizer = optimizer_of(model, "SGD", RATE, setting.device)
        self.sparsity = sparsity.attach(model, self.optimizer, masks)
        self.waited: list[float] = []

    def __call__(self) -> None:
        """Train an epoch."""
        rows = self.trainer.fit(Stage(0, 1, lambda step: RATE), self.optimizer, self.sparsity)
        self.waited.append(rows[0]["data_wait"])


def repeated(step: Callable[[], object], steps: int, device: torch.device) -> Callable[[], None]:
    """`steps` steps as one piece of work, waited for."""

    def work() -> None:
        for _ in range(steps):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return work


def compare(report: Report, setting: Setting, steps: int, rounds: int, target: str, compile: bool) -> None:
    """The rows of one network."""
    clock = time.process_time if setting.device.type == "cpu" else time.perf_counter
    images = setting.batch * steps
    label = f"{setting.model}, {setting.size} px, batch {setting.batch}, {str(setting.dtype).removeprefix('torch.')}"
    name = "sieve, a level" + (", compiled" if compile else "")
    level = Level(setting, steps, compile)
    level()
    found = leaks(Arm(setting, level.trainer.model, level.optimizer), level.sparsity.masks)
    report.gate(f"{label}: after an epoch, pruned weights and optimizer state are 0.0", found == 0, f"{found} are not")
    bare = repeated(ours(setting, "SGD", RATE, fits(setting, "SGD")), steps, setting.device)
    pairs = measure.interleave(level, bare, rounds, clock=clock)
    if not compile:
        report.add(measure.faster(f"level, {label}", name, "bare loop", pairs, ">= 0.95", images))
    report.add(
        measure.figure(f"level, {label}: share of time waiting for data", name, max(level.waited), "of the time")
    )
    plain = dataclasses.replace(setting, channels_last=False)
    model, masks = network(plain)
    peer = repeated(harness_step(model, masks, batch_of(plain), setting.dtype, RATE), steps, setting.device)
    for arm, work, wanted in ((name, level, target), ("sieve, bare loop", bare, "")):
        pairs = measure.interleave(work, peer, rounds, clock=clock)
        report.add(measure.faster(f"step, {label}", arm, "published harness's step", pairs, wanted, images))


def main(arguments: list[str]) -> int:
    """Measure and write benchmarks/out/trainer.csv; 1 where a gate fails."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trainer", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu (one thread) or cuda")
    parser.add_argument("--precision", default="bfloat16", help="of the forward pass (default bfloat16)")
    parser.add_argument("--steps", type=int, default=None, help="steps a run (default 10, on a GPU 40)")
    parser.add_argument("--rounds", type=int, default=9, help="pairs a row (default 9)")
    parser.add_argument("--out", type=Path, default=measure.OUT, help="where trainer.csv goes")
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    dtype = precision.choose(given.precision, device)
    report = Report("trainer", out=given.out)
    for setting, target, compile in settings(device, dtype):
        if not compile:
            one_pass = fits(setting, "SGD")
            small = dataclasses.replace(setting, batch=min(setting.batch, 8))
            check(report, small, "SGD", functools.partial(ours, one_pass=one_pass), setting.model)
        compare(report, setting, given.steps or (10 if device.type == "cpu" else 40), given.rounds, target, compile)
    return report.finish()


def settings(device: torch.device, dtype: torch.dtype) -> list[tuple[Setting, str, bool]]:
    """What is measured: networks with the ratio wanted against the published step, and whether compiled."""

    def one(model: str, batch: int, size: int = 32, classes: int = 10) -> Setting:
        return Setting(model, classes, size, batch, 0.1, device, dtype)

    if device.type == "cpu":
        torch.set_num_threads(1)
        return [(one("cifar/resnet20", 128), ">= 1.4", False), (one("cifar/resnet18", 64), ">= 1.3", False)]
    large, small = one("torchvision/resnet50", 256, 224, 1000), one("torchvision/resnet18", 1024, 224, 1000)
    cifar = one("cifar/resnet18", 512)
    return [
        (large, ">= 1.8", False), (large, ">= 1.8", True), (small, ">= 1.5", False), (small, ">= 1.5", True),
        (cifar, "", False), (cifar, "", True),
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
