"""Mixup and CutMix: training images mixed with others of the same batch, labels in proportion."""

from __future__ import annotations

import numpy as np
import torch


def mix(
    images: torch.Tensor, labels: torch.Tensor, classes: int, mixup_alpha: float, cutmix_alpha: float, key: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixed images, and soft targets float32 [B, classes], of images [B, C, H, W] and int64 labels [B].

    Mixup (Zhang et al. 2018): lambda x_i + (1 - lambda) x_j. CutMix (Yun et al. 2019): a box of x_j, of area 1 - lambda
    before it is clipped at the border, pasted into x_i; lambda is then what is left of x_i. lambda ~ Beta(alpha, alpha)
    is one number per batch. With both alphas above 0 a batch takes one of the two methods, each with probability 1/2;
    with neither images stay as they are. Partners and lambda depend on `key` and the batch size alone. The inputs are
    not changed.
    """
    draws = np.random.Generator(np.random.Philox(key))
    choice, corner = draws.random(), draws.random(2)
    partner = torch.from_numpy(draws.permutation(len(labels))).to(images.device, non_blocking=True)
    targets = torch.zeros(len(labels), classes, device=images.device).scatter_(1, labels[:, None], 1.0)
    if mixup_alpha <= 0 and cutmix_alpha <= 0:
        return images, targets
    if cutmix_alpha > 0 and (mixup_alpha <= 0 or choice < 0.5):
        mixed, kept = _cutmix(images, partner, draws.beta(cutmix_alpha, cutmix_alpha), corner)
    else:
        kept = float(draws.beta(mixup_alpha, mixup_alpha))
        mixed = images.mul(kept).add_(images[partner], alpha=1 - kept)
    return mixed, targets.mul(kept).add_(targets[partner], alpha=1 - kept)


def _cutmix(images: torch.Tensor, partner: torch.Tensor, kept: float, centre: np.ndarray) -> tuple[torch.Tensor, float]:
    """`images` with one box of their partners' pixels, and the share of each image that is still its own."""
    height, width = images.shape[2:]
    side = np.sqrt(1.0 - kept)
    middle_y, middle_x = int(centre[0] * height), int(centre[1] * width)
    half_y, half_x = int(height * side) // 2, int(width * side) // 2
    top, bottom = max(0, middle_y - half_y), min(height, middle_y + half_y)
    left, right = max(0, middle_x - half_x), min(width, middle_x + half_x)
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = images[:, :, top:bottom, left:right][partner]
    return mixed, 1.0 - (bottom - top) * (right - left) / (height * width)
