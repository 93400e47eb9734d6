"""Loader `torchvision`: pixels that depend on nothing but the epoch and the sample, clear errors, no leaked process."""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, RandAugment

from utils import params
from utils.data import augment, stateless
from utils.data.order import Shard, epoch_order
from utils.data.resolve import resolve
from utils.data.torchvision_loader import TorchvisionLoader
from utils.system.errors import UserError

CPU = torch.device("cpu")
COUNT = 40
INDICES = np.arange(1, COUNT, 2)


class Noise:
    """A source of random images of differing sizes, or all of one; labels are the index."""

    def __init__(self, bad: int = -1, same: bool = True) -> None:
        draws = np.random.default_rng(0)
        sizes = [(12, 12) if same else tuple(draws.integers(10, 30, 2)) for _ in range(COUNT)]
        self.pixels = [draws.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
        self.labels, self.classes, self.bad = np.arange(COUNT), ["a"], bad

    def __len__(self) -> int:
        return COUNT

    def image(self, index: int) -> Image.Image:
        if index == self.bad:
            raise UserError(f"cannot read image /somewhere/{index}.png (truncated); replace or remove it")
        return Image.fromarray(self.pixels[index])

    def digest(self) -> str:
        return ""


def loader(source: Noise, shard: Shard, workers: int = 1, training: bool = True, **data: Any) -> TorchvisionLoader:
    values = {"name": "cifar10", "loader": "torchvision", "image_size": 12, "pad": 2, **data}
    return TorchvisionLoader(
        resolve(params.Data(**values)),
        source,
        INDICES,
        shard,
        CPU,
        training=training,
        order_seed=3,
        channels_last=True,
        workers=workers,
        eval_batch=7,
    )


def collect(one: TorchvisionLoader, epoch: int, start: int = 0, size: int | None = None) -> list[Any]:
    one.set_epoch(0, epoch, start, size)
    batches = list(one)
    one.close()
    return batches


def by_index(batches: list[Any]) -> dict[int, torch.Tensor]:
    return {int(label): image for images, labels in batches for image, label in zip(images, labels, strict=True)}


def plain(spec: Any, pixels: np.ndarray) -> np.ndarray:
    mean, std = (np.array(values, dtype=np.float32) for values in (spec.mean, spec.std))
    return ((pixels.astype(np.float32) - mean) / std).transpose(2, 0, 1)


def no_children() -> bool:
    deadline = time.monotonic() + 10
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.05)
    return not multiprocessing.active_children()


@pytest.mark.parametrize("cutout", [0, 5])
def test_crop_flip_and_cutout_pixel_by_pixel(cutout: int) -> None:
    source = Noise()
    train = loader(source, Shard(0, 1, 4), cutout=cutout)
    batches = collect(train, 2)
    key, order = stateless.epoch_key(3, 0, 2), INDICES[epoch_order(3, 0, 2, len(INDICES))]
    assert [int(label) for _, labels in batches for label in labels] == order.tolist()
    for index, image in by_index(batches).items():
        alone = np.array([index])
        oy, ox = augment.crop_offsets(key, alone, 2)[0]
        padded = np.zeros((16, 16, 3), dtype=np.uint8)
        padded[2:14, 2:14] = source.pixels[index]
        pixels = padded[oy : oy + 12, ox : ox + 12]
        expected = plain(train.spec, pixels[:, ::-1] if augment.flips(key, alone)[0] else pixels)
        if cutout:
            cy, cx = augment.cutout_corners(key, alone, 12, cutout)[0]
            expected[:, max(0, cy) : cy + cutout, max(0, cx) : cx + cutout] = 0
        np.testing.assert_array_equal(image.numpy(), expected)


def test_resized_crops_of_the_whole_image_are_pillows() -> None:
    source = Noise(same=False)
    train = loader(source, Shard(0, 1, 4), augment="rrc", flip=False)
    key = stateless.epoch_key(3, 0, 1)
    for size in (None, 8):
        for index, image in by_index(collect(train, 1, size=size)).items():
            height, width = source.pixels[index].shape[:2]
            y, x, h, w = augment.rrc_boxes(key, np.array([index]), np.array([height]), np.array([width]))[0]
            part = Image.fromarray(source.pixels[index][y : y + h, x : x + w])
            resized = part.resize((size or 12, size or 12), Image.Resampling.BILINEAR)
            np.testing.assert_array_equal(image.numpy(), plain(train.spec, np.asarray(resized)))


def test_evaluation_shows_every_image_once_in_order() -> None:
    source = Noise(same=False)
    parts = [loader(source, Shard(rank, 2, 2), training=False) for rank in range(2)]
    batches = [collect(part, 0) for part in parts]
    assert [int(label) for _, labels in batches[0] for label in labels] == INDICES[::2].tolist()
    images = by_index(batches[0] + batches[1])
    assert sorted(images) == INDICES.tolist()
    for index, image in images.items():
        pixels = source.pixels[index]
        height, width = pixels.shape[:2]
        side = min(height, width)
        y, x = (height - side) // 2, (width - side) // 2
        square = Image.fromarray(pixels[y : y + side, x : x + side])
        resized = np.asarray(square.resize((12, 12), Image.Resampling.BILINEAR))
        np.testing.assert_array_equal(image.numpy(), plain(parts[0].spec, resized))


@pytest.mark.parametrize(
    "data", [{}, {"augment": "rrc", "randaugment": 2, "cutout": 3}], ids=["crop", "rrc+randaugment"]
)
def test_pixels_are_the_same_for_any_number_of_workers_and_ranks(data: dict[str, Any]) -> None:
    source = Noise(same=False)
    whole = [collect(loader(source, Shard(0, 1, 4), **data), epoch) for epoch in (0, 1)]
    several = loader(source, Shard(0, 1, 4), workers=2, **data)
    for epoch in (0, 1):  # the workers stay, the epoch reaches them
        several.set_epoch(0, epoch)
        for (images, labels), expected in zip(several, whole[epoch], strict=True):
            assert torch.equal(images, expected[0])
            assert torch.equal(labels, expected[1])
    several.close()
    parts = [collect(loader(source, Shard(rank, 2, 4, 2), **data), 1) for rank in range(2)]
    pixels = by_index(whole[1])
    for step, (_, labels) in enumerate(whole[1]):
        union = [int(label) for part in parts for _, own in part[2 * step : 2 * step + 2] for label in own]
        assert sorted(union) == sorted(labels.tolist())
    assert all(torch.equal(image, pixels[index]) for index, image in by_index(parts[0] + parts[1]).items())
    first = by_index(whole[0])
    assert np.mean([not torch.equal(first[index], pixels[index]) for index in pixels]) > 0.7
    assert no_children()


def test_randaugment_is_torchvisions_seeded_by_epoch_and_sample_and_leaves_the_generator() -> None:
    source = Noise()
    state = torch.random.get_rng_state()
    train = loader(source, Shard(0, 1, 4), augment="none", flip=False, randaugment=2, randaugment_magnitude=15)
    pixels = by_index(collect(train, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    operation = RandAugment(2, 15, interpolation=InterpolationMode.BILINEAR)
    for index, image in pixels.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stateless.derive("randaugment", stateless.epoch_key(3, 0, 1), index))
            expected = operation(source.image(index))
        np.testing.assert_array_equal(image.numpy(), plain(train.spec, np.asarray(expected)))
    changed = [not np.array_equal(image.numpy(), plain(train.spec, source.pixels[i])) for i, image in pixels.items()]
    assert np.mean(changed) > 0.5


@pytest.mark.parametrize("workers", [1, 2])
def test_resuming_gives_the_rest_of_the_epoch(workers: int) -> None:
    source = Noise()
    whole = collect(loader(source, Shard(0, 1, 4), workers), 5)
    rest = collect(loader(source, Shard(0, 1, 4), workers), 5, start=3)
    assert len(whole) == 5
    for (images, labels), expected in zip(rest, whole[3:], strict=True):
        assert torch.equal(images, expected[0])
        assert torch.equal(labels, expected[1])


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("training", [True, False])
def test_an_unreadable_image_stops_the_iteration_by_name(workers: int, training: bool) -> None:
    broken = loader(Noise(bad=21), Shard(0, 1, 4), workers, training)
    with pytest.raises(UserError) as caught:
        list(broken)
    assert str(caught.value) == "cannot read image /somewhere/21.png (truncated); replace or remove it"
    assert no_children()


@pytest.mark.parametrize("training", [True, False])
def test_a_partial_iteration_leaves_nothing_and_the_next_is_whole(training: bool) -> None:
    source = Noise()
    expected = collect(loader(source, Shard(0, 1, 4), training=training), 0)
    several = loader(source, Shard(0, 1, 4), 2, training)
    iterator = iter(several)
    kept = next(iterator)
    iterator.close()  # type: ignore[attr-defined]
    again = list(several)
    assert torch.equal(kept[0], expected[0][0])
    assert all(torch.equal(a[0], b[0]) for a, b in zip(again, expected, strict=True))
    half = iter(several)
    next(half)
    several.close()
    assert no_children()
    with pytest.raises(RuntimeError, match="ended"):
        next(half)
    assert len(list(several)) == len(several)
    several.close()
    assert no_children()


def test_evaluation_workers_end_with_the_iteration_and_training_workers_stay() -> None:
    train, evaluation = (loader(Noise(), Shard(0, 1, 4), 2, training) for training in (True, False))
    list(evaluation)
    assert no_children()
    list(train)
    assert len(multiprocessing.active_children()) == 2
    train.close()
    assert no_children()


def test_a_newer_iteration_ends_the_older() -> None:
    train = loader(Noise(), Shard(0, 1, 4))
    older, never_started = iter(train), iter(train)
    newest = iter(train)
    next(newest)
    for ended in (older, never_started):
        with pytest.raises(RuntimeError, match="newer"):
            next(ended)
    assert len(list(newest)) == len(train) - 1


def test_the_global_random_state_is_left_alone() -> None:
    train = loader(Noise(), Shard(0, 1, 4), 2, randaugment=1)
    state = torch.random.get_rng_state()
    collect(train, 0)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_worker_that_dies_stops_the_iteration() -> None:
    train = loader(Noise(), Shard(0, 1, 1), 2)
    iterator = iter(train)
    next(iterator)

    def kill_and_read() -> None:
        multiprocessing.active_children()[0].kill()
        with contextlib.suppress(OSError, EOFError):  # what reading from it says, where that is quicker
            list(iterator)
        time.sleep(20)

    with pytest.raises(RuntimeError, match="worker"):  # raised by the signal of its death, wherever that arrives
        kill_and_read()
    train.close()
    assert no_children()
    assert len(list(train)) == len(train)
    train.close()
