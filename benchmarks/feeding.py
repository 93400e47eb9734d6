"""One loader on several threads by the wall clock, and a training loop that it feeds: rows of `benchmarks.loader`.

Where the rows per core ask what an image costs, these ask what a training loop gets. A step of the masked network, on
one batch that lies on the device, and the loader, with nobody at work on its images, each have a speed; a loop that
does both at once can have no more than the slower's, and shows how well loading hides behind training.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import loader_arms, measure, step
from benchmarks.measure import Pairs, Report
from utils.data import beton_format
from utils.data.order import Shard
from utils.system import memory
from utils.training import precision

MANY = 16
"""Threads from which the loader's target holds."""
FEW = 128
"""Images of a run of training on a CPU."""


BATCH = 256
"""Images of a batch on a GPU and of the loader's alone: every thread gets some of each."""


@dataclass(frozen=True)
class Feed:
    """What is fed. images: of one run, a multiple of the batch; size: image side; threads: of the loader."""

    model: str
    size: int
    batch: int
    images: int
    threads: int
    device: torch.device
    dtype: torch.dtype

    @property
    def setting(self) -> step.Setting:
        """What the step is made from; labels of the files are below 10."""
        return step.Setting(self.model, 10, self.size, self.batch, 0.1, self.device, self.dtype)


def feed_of(device: torch.device, threads: int, each: int) -> Feed:
    """The usual one: ResNet-50 at 224 pixels and `each` images a thread on a GPU, a small network and FEW on a CPU."""
    dtype = precision.choose("bfloat16", device)
    if device.type == "cpu":
        return Feed("cifar/resnet20", 32, 32, FEW, threads, device, dtype)
    return Feed("torchvision/resnet50", loader_arms.SIDE, BATCH, whole(each * threads), threads, device, dtype)


def whole(images: int) -> int:
    """`images` up to whole batches."""
    return -(-images // BATCH) * BATCH


def loader_of(path: Path, feed: Feed) -> Any:
    """The FFCV loader whose epochs have `feed.images` images, those of the file in turn as often as that takes."""
    from utils.data.ffcv_loader import FFCVLoader

    samples = beton_format.read_header(path).samples
    return FFCVLoader(
        loader_arms.spec_of(image_size=feed.size, eval_size=feed.size), path, np.arange(feed.images) % samples,
        Shard(0, 1, feed.batch, 1), feed.device,
        training=True, order_seed=3, channels_last=True, workers=feed.threads, eval_batch=feed.batch,
    )  # fmt: skip


class Feeding:
    """The three arms. Each call takes an epoch; `seen` counts the images the loader gave."""

    def __init__(self, path: Path, feed: Feed) -> None:
        self.feed, self.epoch, self.seen = feed, 0, 0
        self.loader = loader_of(path, feed)
        one_pass = step.fits(feed.setting, "SGD")
        self.arm = step.ours(feed.setting, "SGD", 1e-4, one_pass)
        self.lying = self.arm.batch

    def close(self) -> None:
        """End the loader."""
        self.loader.close()

    def alone(self) -> None:
        """As many steps as an epoch has, on one batch."""
        self.arm.batch = self.lying
        for _ in range(self.feed.images // self.feed.batch):
            self.arm()
        measure.wait(self.feed.device)

    def loaded(self) -> None:
        """An epoch's images on the device, normalised, and dropped."""
        self._read(lambda: None)

    def fed(self) -> None:
        """Both: a step on every batch of an epoch."""
        self._read(self.arm)

    def _read(self, use: Callable[[], object]) -> None:
        self.loader.set_epoch(0, self.epoch)
        self.epoch += 1
        for batch in self.loader:
            self.arm.batch = batch
            use()
            self.seen += len(batch[1])
        measure.wait(self.feed.device)


def in_turn(works: Sequence[Callable[[], None]], rounds: int) -> list[tuple[float, ...]]:
    """Wall-clock seconds of every one of `works`, round by round, after a round that is not counted.

    Every second round runs backwards, so that none always follows the same.
    """
    found: list[tuple[float, ...]] = []
    for number in range(-1, rounds):
        order = list(range(len(works)))
        costs = {place: measure.cost(works[place], time.perf_counter) for place in order[:: -1 if number % 2 else 1]}
        if number >= 0:
            found.append(tuple(costs[place] for place in order))
    return found


def overlap(costs: Sequence[tuple[float, ...]]) -> Pairs:
    """The first of each round against the slowest of the others."""
    return Pairs(tuple(round[0] for round in costs), tuple(max(round[1:]) for round in costs))


def threads_row(report: Report, name: str, path: Path, threads: int, each: int, rounds: int) -> measure.Row:
    """Images per second of the loader's batches as bytes in the host's memory, by the wall clock, of 224 pixels."""
    images = whole(each * threads)
    feed = Feed("", loader_arms.SIDE, BATCH, images, threads, loader_arms.CPU, torch.float32)
    loader, epochs = loader_of(path, feed), itertools.count()

    def read() -> None:
        came = loader_arms.counted(loader_arms.sieve_bytes(loader, next(epochs)))
        if came != images:
            raise RuntimeError(f"{came} images came of {images}")

    try:
        read()
        costs = [measure.cost(read, time.perf_counter) for _ in range(rounds)]
    finally:
        loader.close()
    seconds, _ = measure.median_and_spread(costs)
    told = f"{name}, {loader.workers} threads, wall clock"
    target = ">= 18,000" if loader.workers >= MANY else ""
    return report.add(measure.figure(told, "sieve, resize=ffcv", images / seconds, "images/s", target))


def overlap_row(report: Report, path: Path, feed: Feed, rounds: int) -> measure.Row:
    """Training fed by the loader against the slower of the two alone."""
    if feed.device.type == "cpu":
        torch.set_num_threads(1)
        memory.keep_freed()  # as in a process of the harness
    measure.settle(feed.device)
    feeding = Feeding(path, feed)
    try:
        costs = in_turn([feeding.fed, feeding.alone, feeding.loaded], rounds)
    finally:
        feeding.close()
    wanted = 2 * (rounds + 1) * feed.images
    report.gate("the loader gives every image of its epochs", feeding.seen == wanted, f"{feeding.seen} of {wanted}")
    for place, what in ((1, "step"), (2, "loader onto the device")):
        speed = feed.images / statistics.median(round[place] for round in costs)
        report.add(measure.figure(f"{what} alone, {_label(feed)}", "sieve", speed, "images/s"))
    target = ">= 0.97" if feed.device.type == "cuda" else ""
    name = f"overlap, {_label(feed)}"
    return report.add(measure.faster(name, "fed", "the slower alone", overlap(costs), target, feed.images))


def _label(feed: Feed) -> str:
    name = str(feed.dtype).removeprefix("torch.")
    return f"{feed.model}, {feed.size} px, batch {feed.batch}, {name}, {feed.threads} threads, {feed.device.type}"
