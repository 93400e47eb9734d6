"""Loader `device` against a plain loop over Pillow images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from utils import params
from utils.data import augment, device_loader, stateless
from utils.data.device_loader import DeviceLoader
from utils.data.order import Shard, epoch_order
from utils.data.resolve import resolve
from utils.system.errors import UserError

CPU = torch.device("cpu")
COUNT = 60
INDICES = np.arange(1, COUNT, 2)  # the split is part of its source, so positions and indices differ


class Noise:
    """A source of random images; labels are the index, so that a batch tells whose images it holds."""

    def __init__(self, height: int = 12, width: int = 12) -> None:
        self.pixels = np.random.default_rng(0).integers(0, 256, (COUNT, height, width, 3), dtype=np.uint8)
        self.labels, self.classes = np.arange(COUNT), ["a"]

    def __len__(self) -> int:
        return COUNT

    def image(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index])

    def digest(self) -> str:
        return ""


def loader(
    source: Noise, shard: Shard, training: bool = True, channels_last: bool = False, **data: Any
) -> DeviceLoader:
    spec = resolve(params.Data(name="cifar10", loader="device", **{"image_size": 12, "pad": 2, **data}))
    return DeviceLoader(
        spec,
        source,
        INDICES,
        shard,
        CPU,
        training=training,
        order_seed=3,
        channels_last=channels_last,
        workers=2,
        eval_batch=7,
    )


def plain(spec: Any, pixels: np.ndarray) -> np.ndarray:
    """(pixel - mean) / std in float32, channels first."""
    mean, std = (np.array(values, dtype=np.float32) for values in (spec.mean, spec.std))
    return ((pixels.astype(np.float32) - mean) / std).transpose(2, 0, 1)


def by_index(batches: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[int, torch.Tensor]:
    return {int(label): image for images, labels in batches for image, label in zip(images, labels, strict=True)}


@pytest.mark.parametrize("channels_last", [False, True])
def test_without_augmentation_pixels_are_bit_equal_to_pillow(channels_last: bool) -> None:
    source = Noise()
    train = loader(source, Shard(0, 1, 8), augment="none", flip=False, channels_last=channels_last)
    train.set_epoch(1, 2)
    batches = list(train)
    order = INDICES[epoch_order(3, 1, 2, len(INDICES))]
    assert len(batches) == len(train) == 3
    for step, (images, labels) in enumerate(batches):
        assert images.dtype == torch.float32
        assert images.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        assert labels.tolist() == order[step * 8 : step * 8 + 8].tolist()
        for image, index in zip(images, labels.tolist(), strict=True):
            np.testing.assert_array_equal(image.numpy(), plain(train.spec, np.asarray(source.image(index))))


def test_evaluation_shows_every_image_once_in_order_cropped_and_resized_as_pillow_does() -> None:
    source = Noise(14, 20)
    parts = [loader(source, Shard(rank, 2, 2), training=False, eval_size=9) for rank in range(2)]
    seen = by_index([batch for part in parts for batch in part])
    assert sum(len(labels) for part in parts for _, labels in part) == len(INDICES)
    assert sorted(seen) == INDICES.tolist()
    for index, image in seen.items():
        square = source.image(index).crop((3, 0, 17, 14)).resize((9, 9), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(image.numpy(), plain(parts[0].spec, np.asarray(square)))
    assert next(iter(parts[1]))[1].tolist() == INDICES[1::2][:7].tolist()


@pytest.mark.parametrize("cutout", [0, 5])
def test_crop_flip_and_cutout_pixel_by_pixel(cutout: int) -> None:
    source = Noise()
    train = loader(source, Shard(0, 1, 8), cutout=cutout)
    train.set_epoch(1, 2)
    key = stateless.epoch_key(3, 1, 2)
    for images, labels in train:
        for image, index in zip(images, labels.tolist(), strict=True):
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


@pytest.mark.parametrize("size", [None, 8])
def test_resized_crops_and_progressive_sizes_are_torchs(size: int | None) -> None:
    source = Noise()
    for kind in ("rrc", "crop"):
        train = loader(source, Shard(0, 1, 8), augment=kind, flip=False, pad=0)
        train.set_epoch(0, 0, size=size)
        key, side = stateless.epoch_key(3, 0, 0), size or 12
        for images, labels in train:
            assert images.shape == (8, 3, side, side)
            for image, index in zip(images, labels.tolist(), strict=True):
                y, x, h, w = (0, 0, 12, 12)
                if kind == "rrc":
                    y, x, h, w = augment.rrc_boxes(key, np.array([index]), np.array([12]), np.array([12]))[0]
                part = torch.from_numpy(source.pixels[index]).permute(2, 0, 1)[None, :, y : y + h, x : x + w].float()
                resized = F.interpolate(part, (side, side), mode="bilinear", antialias=True)[0].permute(1, 2, 0)
                expected = plain(train.spec, resized.numpy())
                np.testing.assert_allclose(image.numpy(), expected, atol=1e-4)


def collect(one: DeviceLoader, epoch: int, start: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    one.set_epoch(0, epoch, start)
    return list(one)


@pytest.mark.parametrize("kind", ["crop", "rrc"])
def test_ranks_share_the_global_batch_and_epochs_differ(kind: str) -> None:
    source = Noise()
    whole = collect(loader(source, Shard(0, 1, 8), augment=kind, cutout=3), 1)
    pixels = by_index(whole)
    parts = [collect(loader(source, Shard(rank, 2, 8, 2), augment=kind, cutout=3), 1) for rank in range(2)]
    for step, (_, labels) in enumerate(whole):
        union = [int(label) for part in parts for _, own in part[2 * step : 2 * step + 2] for label in own]
        assert sorted(union) == sorted(labels.tolist())
    for index, image in by_index(parts[0] + parts[1]).items():
        torch.testing.assert_close(image, pixels[index], atol=1e-5, rtol=0)
    later = by_index(collect(loader(source, Shard(0, 1, 8), augment=kind, cutout=3), 2))
    differ = [not torch.equal(later[label], pixels[label]) for label in later.keys() & pixels.keys()]
    assert np.mean(differ) > 0.9


def test_resuming_gives_the_rest_of_the_epoch_and_kept_batches_stay() -> None:
    train = loader(Noise(), Shard(0, 1, 8))
    kept = []
    train.set_epoch(0, 4)
    copies = []
    for images, labels in train:
        kept.append((images, labels))
        copies.append((images.clone(), labels.clone()))
    rest = collect(train, 4, start=1)
    assert len(rest) == 2
    for expected, *found in zip(copies[1:], kept[1:], rest, strict=True):
        for images, labels in found:
            assert torch.equal(images, expected[0])
            assert torch.equal(labels, expected[1])
    evaluation = loader(Noise(), Shard(0, 1, 8), training=False)
    later = collect(evaluation, 0, start=3)
    assert [labels.tolist() for _, labels in later] == [labels.tolist() for _, labels in collect(evaluation, 0)][3:]


def test_two_iterations_do_not_disturb_each_other() -> None:
    train = loader(Noise(), Shard(0, 1, 8))
    alone = [collect(train, 0), collect(train, 1)]
    train.set_epoch(0, 0)
    first = iter(train)
    train.set_epoch(0, 1)
    second = iter(train)
    for step, pair in enumerate(zip(first, second, strict=True)):
        for which, (images, labels) in enumerate(pair):
            assert torch.equal(images, alone[which][step][0])
            assert torch.equal(labels, alone[which][step][1])


def test_what_does_not_fit_is_refused_before_anything_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_loader, "free_bytes", lambda device: 20_000)
    monkeypatch.setattr(device_loader, "decode", lambda *arguments: pytest.fail("decoded"))
    with pytest.raises(UserError, match=r"data\.loader=device needs .* set data\.loader=ffcv"):
        loader(Noise(), Shard(0, 1, 8))


def test_free_memory_is_no_more_than_the_machine_has() -> None:
    total = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    assert 0 < device_loader.free_bytes(CPU) <= int(total.split()[1]) * 1024


def test_the_global_random_state_is_left_alone() -> None:
    train = loader(Noise(), Shard(0, 1, 8), cutout=3)
    state, numpy_state = torch.random.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    collect(train, 0)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert np.random.get_state()[1].tolist() == numpy_state  # noqa: NPY002
