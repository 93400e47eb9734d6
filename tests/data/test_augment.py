"""Augmentation against loops over samples and pixels, and against torch's own resizing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from utils.data import augment, stateless

KEY = stateless.epoch_key(1, 2, 3)
INDICES = np.random.default_rng(0).permutation(5000)[:64]


def draw(index: int, stream: int) -> float:
    """The draw of one sample in Python's own integers: SplitMix64's finaliser, applied twice."""
    word, z = 0xFFFFFFFFFFFFFFFF, KEY
    for salt in (int(index), stream + 1):
        z = (z + salt * 0x9E3779B97F4A7C15) & word
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & word
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & word
        z ^= z >> 31
    return (z >> 11) / 2**53


def pictures(n: int, height: int, width: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(1).integers(0, 256, (n, height, width, 3), dtype=np.uint8))


def test_parameters_are_those_of_a_loop_over_samples() -> None:
    offsets = augment.crop_offsets(KEY, INDICES, 4)
    flips = augment.flips(KEY, INDICES)
    corners = augment.cutout_corners(KEY, INDICES, 32, 7)
    for place, index in enumerate(INDICES):
        assert offsets[place].tolist() == [
            int(draw(index, stateless.CROP_Y) * 9),
            int(draw(index, stateless.CROP_X) * 9),
        ]
        assert flips[place] == (draw(index, stateless.FLIP) < 0.5)
        middle = [int(draw(index, stateless.CUTOUT_Y) * 32), int(draw(index, stateless.CUTOUT_X) * 32)]
        assert corners[place].tolist() == [middle[0] - 3, middle[1] - 3]


def test_offsets_flips_and_corners_cover_their_range_evenly() -> None:
    indices = np.arange(50_000)
    offsets = augment.crop_offsets(KEY, indices, 4)
    for axis in (0, 1):
        counts = np.bincount(offsets[:, axis], minlength=9)
        assert len(counts) == 9
        assert np.abs(counts / 50_000 - 1 / 9).max() < 0.008
    assert abs(np.corrcoef(offsets.T)[0, 1]) < 0.03
    assert abs(augment.flips(KEY, indices).mean() - 0.5) < 0.012
    corners = augment.cutout_corners(KEY, indices, 32, 8)
    assert (corners.min(), corners.max()) == (-4, 27)


def inception_box(index: int, height: int, width: int) -> list[int]:
    """One box, step by step, as torchvision's RandomResizedCrop.get_params draws it."""
    for attempt in range(10):
        area = height * width * (0.08 + 0.92 * draw(index, stateless.RRC_AREA + 16 * attempt))
        low, high = math.log(3 / 4), math.log(4 / 3)
        ratio = math.exp(low + (high - low) * draw(index, stateless.RRC_RATIO + 16 * attempt))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            y = int(draw(index, stateless.RRC_Y) * (height - h + 1))
            x = int(draw(index, stateless.RRC_X) * (width - w + 1))
            return [y, x, h, w]
    w, h = width, height
    if width / height < 3 / 4:
        h = round(width / (3 / 4))
    elif width / height > 4 / 3:
        w = round(height * (4 / 3))
    return [(height - h) // 2, (width - w) // 2, h, w]


@pytest.mark.parametrize("size", [(32, 32), (375, 500), (600, 90), (3, 400), (1, 1)])
def test_resized_crop_boxes_are_those_of_the_inception_recipe(size: tuple[int, int]) -> None:
    indices = np.arange(400)
    boxes = augment.rrc_boxes(KEY, indices, np.full(400, size[0]), np.full(400, size[1]))
    assert boxes.tolist() == [inception_box(index, *size) for index in indices]
    assert (boxes[:, 2:] > 0).all()
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= np.array(size)).all()


def test_boxes_of_images_of_different_sizes_do_not_depend_on_each_other() -> None:
    heights, widths = np.random.default_rng(0).integers(5, 300, (2, len(INDICES)))
    together = augment.rrc_boxes(KEY, INDICES, heights, widths)
    for place, index in enumerate(INDICES):
        assert together[place].tolist() == inception_box(int(index), int(heights[place]), int(widths[place]))


def test_areas_and_ratios_follow_their_distributions() -> None:
    n = 20_000
    boxes = augment.rrc_boxes(KEY, np.arange(n), np.full(n, 1000), np.full(n, 1000))
    ratio = boxes[:, 3] / boxes[:, 2]
    assert ratio.min() > 0.745
    assert ratio.max() < 1.34
    assert abs(np.log(ratio).mean()) < 0.005
    share = boxes[:, 2] * boxes[:, 3] / 1e6
    assert share.min() > 0.079
    below_half = share < 0.5  # boxes of up to half the image always fit, whatever their ratio
    assert abs(share[below_half].mean() - 0.29) < 0.005


@pytest.mark.parametrize("pad", [0, 1, 4])
def test_padded_crop_and_mirror_pixel_by_pixel(pad: int) -> None:
    images = pictures(10, 8, 8)
    rows = torch.tensor([3, 3, 9, 0, 5])
    offsets = torch.from_numpy(augment.crop_offsets(KEY, INDICES[:5], pad))
    which = torch.tensor([True, False, True, False, True])
    got = augment.mirror(augment.crop(augment.pad_black(images, pad), rows, offsets, 8), which)
    expected = torch.zeros(5, 8, 8, 3, dtype=torch.uint8)
    for b in range(5):
        for y in range(8):
            for x in range(8):
                from_y = y + int(offsets[b, 0]) - pad
                from_x = (7 - x if which[b] else x) + int(offsets[b, 1]) - pad
                if 0 <= from_y < 8 and 0 <= from_x < 8:
                    expected[b, y, x] = images[rows[b], from_y, from_x]
    assert torch.equal(got, expected)


@pytest.mark.parametrize("size", [5, 12, 40])
def test_resized_crops_are_those_of_torch_one_by_one(size: int) -> None:
    images = pictures(6, 24, 18)
    boxes = torch.tensor([[0, 0, 24, 18], [3, 2, 7, 9], [23, 17, 1, 1], [0, 5, 12, 12], [10, 0, 14, 3], [5, 5, 5, 5]])
    got = augment.resized_crop(images, boxes, size)
    for b, (y, x, h, w) in enumerate(boxes.tolist()):
        part = images[b : b + 1, y : y + h, x : x + w].permute(0, 3, 1, 2).double()
        expected = F.interpolate(part, (size, size), mode="bilinear", antialias=True)[0].permute(1, 2, 0)
        torch.testing.assert_close(got[b].double(), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("channels_last", [False, True])
def test_normalisation_is_pixel_minus_mean_over_std(channels_last: bool) -> None:
    images = pictures(3, 4, 5)
    mean, std = torch.tensor([120.0, 110.5, 99.0]), torch.tensor([60.0, 70.0, 61.25])
    got = augment.normalise(images, mean, std, channels_last)
    for channel in range(3):
        pixels = images[..., channel].numpy().astype(np.float32)
        expected = (pixels - np.float32(mean[channel])) / np.float32(std[channel])
        np.testing.assert_array_equal(got[:, channel].numpy(), expected)
    assert got.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    floats = images.float()
    augment.normalise(floats, mean, std, channels_last)
    assert torch.equal(floats, images.float())


def test_cutout_fills_its_square_with_the_mean_and_nothing_else() -> None:
    images = torch.randn(4, 3, 6, 6) + 10
    corners = torch.tensor([[-2, -2], [0, 3], [4, 4], [2, 1]])
    got = augment.erase(images.clone(), corners, 3)
    for b in range(4):
        for y in range(6):
            for x in range(6):
                inside = 0 <= y - int(corners[b, 0]) < 3 and 0 <= x - int(corners[b, 1]) < 3
                expected = torch.zeros(3) if inside else images[b, :, y, x]
                assert torch.equal(got[b, :, y, x], expected)


def test_cutout_shrinks_with_the_image() -> None:
    assert [augment.cutout_side(8, 32, size) for size in (32, 16, 2)] == [8, 4, 1]
