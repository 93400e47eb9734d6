"""The arms of `benchmarks.trainer`: a level, the bare loop and the published harness's step, each in its own process.

`python -m benchmarks.trainer_arms NAME SETTING` (JSON) answers each line of its input with one line of numbers.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks import measure, processes
from benchmarks.published import harness_step
from benchmarks.step import Arm, Setting, batch_of, fits, leaks, network, optimizer_of, ours
from utils import params, sparsity
from utils.data import Loaders
from utils.data.device_loader import DeviceLoader
from utils.data.order import Shard
from utils.data.spec import DataSpec
from utils.params.load import build as build_params
from utils.system import memory
from utils.system.console import Console
from utils.system.distributed import World
from utils.tasks.classification import ImageClassification
from utils.training.progress import Stage
from utils.training.trainer import Trainer

LEVEL, BARE, PUBLISHED = "level", "bare", "published"
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
        raise AssertionError("a level of given masks scores nothing")

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


# The process ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """What an arm is started with. dtype: name of the forward pass's; steps: of one run."""

    model: str
    classes: int
    size: int
    batch: int
    dtype: str
    device: str
    steps: int
    compile: bool = False
    density: float = 0.1

    @property
    def setting(self) -> Setting:
        """The part all arms share."""
        dtype, device = getattr(torch, self.dtype), torch.device(self.device)
        return Setting(self.model, self.classes, self.size, self.batch, self.density, device, dtype)


class Process(processes.Process):
    """An arm of this file."""

    def __init__(self, name: str, work: Work) -> None:
        super().__init__("benchmarks.trainer_arms", name, json.dumps(work.__dict__), name=name)

    def bare(self) -> float:
        """Seconds an image of the bare loop, in the process of the level: processes differ by more than the two do."""
        return self.cost(BARE)


def start(name: str, work: Work) -> Callable[[], None]:
    """The arm called `name`, ready to run. The harness's own arms hold on to memory as its processes do."""
    setting = work.setting
    if setting.device.type == "cpu":
        torch.set_num_threads(1)
        if name != PUBLISHED:
            memory.keep_freed()
    if name != PUBLISHED:
        measure.settle(setting.device)
    if name == LEVEL:
        return Level(setting, work.steps, work.compile)
    if name == BARE:
        return repeated(ours(setting, "SGD", RATE, fits(setting, "SGD")), work.steps, setting.device)
    plain = replace(setting, channels_last=False)
    model, masks = network(plain)
    return repeated(harness_step(model, masks, batch_of(plain), setting.dtype, RATE), work.steps, setting.device)


def serve(name: str, work: Work) -> None:
    """Answer the lines of the input until it ends."""
    run = start(name, work)
    bare = start(BARE, work) if name == LEVEL else run
    clock = time.process_time if work.device == "cpu" else time.perf_counter

    def reply(words: list[str]) -> tuple[float, ...]:
        if words[0] == "leaks":
            assert isinstance(run, Level)
            return (leaks(Arm(work.setting, run.trainer.model, run.optimizer), run.sparsity.masks),)
        if words[0] == "waited":
            assert isinstance(run, Level)
            return (max(run.waited),)
        begin = clock()
        (bare if words[0] == BARE else run)()
        return clock() - begin, work.steps * work.batch

    processes.serve(reply)


if __name__ == "__main__":
    serve(sys.argv[1], Work(**json.loads(sys.argv[2])))
