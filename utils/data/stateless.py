"""Stateless random numbers: a value is a hash of (key, index, stream), never of what was drawn before.

Pixels must depend only on (seed, level, epoch, sample index), whatever the number of workers or ranks, so every
augmentation draws from here, a whole array of samples at a time.

The hash is the finaliser of SplitMix64 (Steele, Lea, Flood 2014), applied twice.
"""

from __future__ import annotations

import hashlib

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
MIX_A = np.uint64(0xBF58476D1CE4E5B9)
MIX_B = np.uint64(0x94D049BB133111EB)

CROP_Y, CROP_X, FLIP, CUTOUT_Y, CUTOUT_X, RRC_AREA, RRC_RATIO, RRC_Y, RRC_X, RANDAUGMENT = range(10)
"""Streams: one per kind of draw. RRC_AREA and RRC_RATIO use stream + 16 * attempt."""


def derive(*parts: object) -> int:
    """A 63-bit integer that depends on every part: SHA-256 of their text. Equal on all machines."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def epoch_key(seed: int, level: int, epoch: int) -> int:
    """The key all draws of one epoch start from."""
    return derive("epoch", seed, level, epoch)


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * MIX_A
    x = (x ^ (x >> np.uint64(27))) * MIX_B
    return x ^ (x >> np.uint64(31))


def uniform(key: int, indices: np.ndarray, stream: int) -> np.ndarray:
    """Float64 in [0, 1) for each sample index, shape as `indices`."""
    with np.errstate(over="ignore"):
        x = np.uint64(key) + np.asarray(indices).astype(np.uint64) * GOLDEN
        x = _mix(_mix(x) + np.uint64(stream + 1) * GOLDEN)
    return (x >> np.uint64(11)).astype(np.float64) * 2.0**-53
