"""Mixup and CutMix: the published formulas, and randomness that depends on the key alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from utils.data.mixing import mix

CLASSES = 40
LABELS = torch.arange(32)  # one class per image, so that targets tell who was mixed with whom
IMAGES = torch.from_numpy(np.random.default_rng(0).standard_normal((32, 3, 12, 10)).astype(np.float32))


def partners(targets: torch.Tensor) -> tuple[list[int], float]:
    """Who each image was mixed with, and its own share, read off the targets."""
    own = targets[torch.arange(32), LABELS]
    others = targets.clone()
    others[torch.arange(32), LABELS] = 0
    found = [int(row.argmax()) if float(row.max()) > 0 else index for index, row in enumerate(others)]
    share = float(min(own))
    return found, share


@pytest.mark.parametrize("key", range(6))
def test_mixup_is_the_weighted_sum_of_partners(key: int) -> None:
    images, targets = mix(IMAGES, LABELS, CLASSES, 1.0, 0.0, key)
    found, share = partners(targets)
    assert sorted(found) == list(range(32))
    torch.testing.assert_close(images, share * IMAGES + (1 - share) * IMAGES[found])
    torch.testing.assert_close(targets.sum(1), torch.ones(32))


@pytest.mark.parametrize("key", range(6))
def test_cutmix_pastes_one_box_and_counts_its_pixels(key: int) -> None:
    images, targets = mix(IMAGES, LABELS, CLASSES, 0.0, 1.0, key)
    found, share = partners(targets)
    moved = [b for b in range(32) if found[b] != b]
    if share < 1:
        assert len(moved) > 20
    changed = (images != IMAGES).all(1)
    for b in moved:
        assert torch.equal(changed[b], changed[moved[0]])
        assert torch.equal(images[b][:, changed[b]], IMAGES[found[b]][:, changed[b]])
        rows, columns = changed[b].any(1), changed[b].any(0)
        assert torch.equal(changed[b], rows[:, None] & columns)
        assert abs(1 - float(changed[b].float().mean()) - share) < 1e-6


def test_the_key_alone_decides_and_inputs_stay() -> None:
    before = IMAGES.clone()
    torch.manual_seed(0)
    first = mix(IMAGES, LABELS, CLASSES, 0.4, 1.0, 5)
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    again = mix(IMAGES, LABELS, CLASSES, 0.4, 1.0, 5)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(mix(IMAGES, LABELS, CLASSES, 0.4, 1.0, 6)[1], first[1])
    assert torch.equal(IMAGES, before)
    other = mix(IMAGES * 2, LABELS, CLASSES, 0.4, 1.0, 5)[1]
    assert torch.equal(other, first[1])


def test_with_both_each_takes_half_of_the_batches() -> None:
    pasted, small = 0, IMAGES[:8, :1, :4, :4]
    for key in range(400):
        images, _ = mix(small, LABELS[:8], CLASSES, 1.0, 1.0, key)
        pasted += int(torch.isin(images, small).all())  # CutMix moves values, mixup makes new ones
    assert 150 < pasted < 250


def test_lambda_follows_its_beta_distribution() -> None:
    for alpha in (0.2, 1.0):
        shares = [partners(mix(IMAGES[:, :, :1, :1], LABELS, CLASSES, alpha, 0.0, key)[1])[1] for key in range(1500)]
        assert abs(np.mean(shares) - 0.5) < 0.05
        assert abs(np.var(shares) - 1 / (4 * (2 * alpha + 1))) < 0.02


def test_cutmix_boxes_have_the_published_sizes_and_places() -> None:
    """Shares kept over many keys, against the formulas of the paper drawn from another generator."""
    images = torch.zeros(2, 1, 50, 80)
    kept = [float(mix(images, LABELS[:2], 2, 0.0, 1.0, key)[1].diagonal().min()) for key in range(2000)]
    kept = [share for share in kept if share < 1]  # a batch of two keeps its order half of the time
    draws = np.random.default_rng(1)
    share, y, x = draws.random((3, 200_000))
    half = np.sqrt(1 - share) / 2
    height = np.minimum(y + half, 1) - np.maximum(y - half, 0)
    width = np.minimum(x + half, 1) - np.maximum(x - half, 0)
    expected = 1 - height * width
    assert abs(np.mean(kept) - expected.mean()) < 0.04
    assert (
        np.abs(np.quantile(kept, [0.1, 0.25, 0.5, 0.75]) - np.quantile(expected, [0.1, 0.25, 0.5, 0.75])).max() < 0.06
    )


def test_without_either_images_stay_and_targets_are_one_hot() -> None:
    images, targets = mix(IMAGES, LABELS, CLASSES, 0.0, 0.0, 0)
    assert torch.equal(images, IMAGES)
    assert torch.equal(targets, torch.eye(CLASSES)[:32])


@pytest.mark.parametrize("alphas", [(1.0, 0.0), (0.0, 1.0)])
def test_the_memory_format_is_kept(alphas: tuple[float, float]) -> None:
    images, _ = mix(IMAGES.to(memory_format=torch.channels_last), LABELS, CLASSES, *alphas, 0)
    assert images.is_contiguous(memory_format=torch.channels_last)
