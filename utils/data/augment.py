"""Augmentation: stateless random parameters per sample (numpy), and their application to whole batches (torch).

The first half draws: every number is a hash of (epoch key, sample index, stream), so that it depends on nothing
else, and all loaders draw the same. The second half acts on uint8 images [B, H, W, 3] on any device.
Order of operations: crop or resized crop, mirror, progressive resizing, normalisation, cutout.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

from utils.data import stateless
from utils.data.stateless import uniform

RRC_AREA = (0.08, 1.0)
RRC_RATIO = (3 / 4, 4 / 3)
RRC_ATTEMPTS = 10
ATTEMPT_STRIDE = 16
"""Streams RRC_AREA and RRC_RATIO of attempt a are moved by a * ATTEMPT_STRIDE."""


def crop_offsets(key: int, indices: np.ndarray, pad: int) -> np.ndarray:
    """Top left corners (y, x) of random crops in images padded by `pad` on each side: int64 [n, 2], 0 to 2 * pad."""
    draws = [uniform(key, indices, stream) for stream in (stateless.CROP_Y, stateless.CROP_X)]
    return np.floor(np.stack(draws, axis=1) * (2 * pad + 1)).astype(np.int64)


def flips(key: int, indices: np.ndarray) -> np.ndarray:
    """Which images are mirrored: bool [n], each with probability 1/2."""
    return uniform(key, indices, stateless.FLIP) < 0.5


def cutout_corners(key: int, indices: np.ndarray, size: int, side: int) -> np.ndarray:
    """Top left corners (y, x) of squares of `side` whose centre is uniform over the image of `size`: int64 [n, 2].

    As in Cutout (DeVries and Taylor 2017) the square may lie partly outside the image, so corners may be negative.
    """
    draws = [uniform(key, indices, stream) for stream in (stateless.CUTOUT_Y, stateless.CUTOUT_X)]
    return np.floor(np.stack(draws, axis=1) * size).astype(np.int64) - side // 2


def rrc_boxes(key: int, indices: np.ndarray, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """Boxes (y, x, height, width) of random resized crops of images of the given sizes: int64 [n, 4].

    The Inception recipe (Szegedy et al. 2015): area uniform in 0.08 to 1 of the image, aspect ratio log-uniform in 3/4
    to 4/3, place uniform; the first of 10 attempts that fits, else the largest centred box within the ratios.
    """
    heights, widths = np.asarray(heights, dtype=np.int64), np.asarray(widths, dtype=np.int64)
    box_h, box_w = _centre_sides(heights, widths)
    centred = np.ones(len(box_h), dtype=bool)
    for attempt in range(RRC_ATTEMPTS):
        open_ = np.flatnonzero(centred)
        if not len(open_):
            break
        high, wide, shift = heights[open_], widths[open_], attempt * ATTEMPT_STRIDE
        low, top = RRC_AREA
        area = high * wide * (low + (top - low) * uniform(key, indices[open_], stateless.RRC_AREA + shift))
        low, top = math.log(RRC_RATIO[0]), math.log(RRC_RATIO[1])
        ratio = np.exp(low + (top - low) * uniform(key, indices[open_], stateless.RRC_RATIO + shift))
        h, w = np.rint(np.sqrt(area / ratio)).astype(np.int64), np.rint(np.sqrt(area * ratio)).astype(np.int64)
        fits = (h > 0) & (h <= high) & (w > 0) & (w <= wide)
        box_h[open_[fits]], box_w[open_[fits]] = h[fits], w[fits]
        centred[open_[fits]] = False
    free_y, free_x = heights - box_h, widths - box_w
    y = np.where(centred, free_y // 2, np.floor(uniform(key, indices, stateless.RRC_Y) * (free_y + 1)).astype(np.int64))
    x = np.where(centred, free_x // 2, np.floor(uniform(key, indices, stateless.RRC_X) * (free_x + 1)).astype(np.int64))
    return np.stack([y, x, box_h, box_w], axis=1)


def _centre_sides(heights: np.ndarray, widths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sides of the largest box within RRC_RATIO, for images that no attempt fitted."""
    ratio = widths / heights
    high, wide = heights.copy(), widths.copy()
    narrow, broad = ratio < RRC_RATIO[0], ratio > RRC_RATIO[1]
    high[narrow] = np.rint(widths[narrow] / RRC_RATIO[0]).astype(np.int64)
    wide[broad] = np.rint(heights[broad] * RRC_RATIO[1]).astype(np.int64)
    return high, wide


def pad_black(images: torch.Tensor, pad: int) -> torch.Tensor:
    """`images` [N, H, W, 3] with `pad` rows and columns of pixel value 0 (black) on each side, before normalisation."""
    return F.pad(images, (0, 0, pad, pad, pad, pad)) if pad else images


def crop(padded: torch.Tensor, rows: torch.Tensor, offsets: torch.Tensor, size: int) -> torch.Tensor:
    """Crops [B, size, size, 3] of images `rows` [B] of `padded` [N, H, W, 3] at corners `offsets` [B, 2] (y, x)."""
    n, height, width, channels = padded.shape
    s_n, s_y, s_x, s_c = padded.stride()
    # A view that names every crop of every image; indexing its first three dimensions copies whole crops.
    windows = padded.as_strided(
        (n, height - size + 1, width - size + 1, size, size, channels), (s_n, s_y, s_x, s_y, s_x, s_c)
    )
    return windows[rows, offsets[:, 0], offsets[:, 1]]


def mirror(images: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
    """`images` [B, H, W, 3] with those that `which` (bool [B]) names mirrored left to right."""
    return torch.where(which[:, None, None, None], images.flip(2), images)


def resized_crop(images: torch.Tensor, boxes: torch.Tensor, size: int) -> torch.Tensor:
    """Boxes (y, x, height, width) [B, 4] of `images` [B, H, W, 3], resized: float32 [B, size, size, 3].

    Bilinear with antialiasing (a triangle filter as wide as the reduction), reading nothing outside a box.
    """
    with torch.autocast(images.device.type, enabled=False):
        rows = _resize_weights(boxes[:, 0], boxes[:, 2], images.shape[1], size)
        columns = _resize_weights(boxes[:, 1], boxes[:, 3], images.shape[2], size)
        return torch.einsum("btw,bswc->bstc", columns, torch.einsum("bsh,bhwc->bswc", rows, images.float()))


def _resize_weights(start: torch.Tensor, length: torch.Tensor, source: int, size: int) -> torch.Tensor:
    """Weights [B, size, source] of source pixels in each output pixel, for intervals [start, start + length)."""
    start, length = start.float()[:, None, None], length.float()[:, None, None]
    scale = length / size
    centre = start + (torch.arange(size, device=start.device)[None, :, None] + 0.5) * scale
    pixel = torch.arange(source, device=start.device)[None, None, :]
    weights = (1 - (pixel + 0.5 - centre).abs() / scale.clamp(min=1)).clamp(min=0)
    weights = weights * ((pixel >= start) & (pixel < start + length))
    return weights / weights.sum(2, keepdim=True)


def normalise(images: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """(pixel - mean) / std of `images` [B, H, W, 3] as float32 [B, 3, H, W], in the memory format asked for."""
    # `to` copies even float32, as the division below is in place.
    pixels = images.to(torch.float32, copy=True).sub_(mean).div_(std).permute(0, 3, 1, 2)
    return pixels.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def erase(images: torch.Tensor, corners: torch.Tensor, side: int) -> torch.Tensor:
    """Set squares of `side` at `corners` [B, 2] (y, x) of normalised `images` [B, 3, H, W] to 0, the mean; in place."""
    y = torch.arange(images.shape[2], device=images.device) - corners[:, :1]
    x = torch.arange(images.shape[3], device=images.device) - corners[:, 1:]
    inside = ((y >= 0) & (y < side))[:, :, None] & ((x >= 0) & (x < side))[:, None, :]
    return images.masked_fill_(inside[:, None], 0.0)


def cutout_side(side: int, image_size: int, size: int) -> int:
    """The side of cutout on images shrunk from `image_size` to `size` by progressive resizing, at least 1 pixel."""
    return max(1, round(side * size / image_size))
