"""The loader's measurement: its pictures, its gates, and how accuracies are compared."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from benchmarks import filters, loader, pictures
from benchmarks.loader_arms import Process
from benchmarks.measure import Report


def test_pictures_are_reproducible_and_weigh_what_photographs_weigh() -> None:
    one, again, other = (pictures.picture(seed, 375, 500) for seed in (3, 3, 4))
    assert one.shape == (375, 500, 3)
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)
    sizes = []
    for image in (one, other):
        handle = io.BytesIO()
        Image.fromarray(image).save(handle, "jpeg", quality=90, subsampling=2)
        sizes.append(handle.tell())
    # ImageNet's photographs, 500 pixels long at quality 90: 51 KB on average; FFCV's writer makes 60 KB of them.
    assert 45e3 < np.mean(sizes) < 65e3


def test_pictures_have_a_falling_spectrum() -> None:
    """The amplitude falls about as 1 / frequency, as that of natural images does."""
    grey = np.mean([pictures.picture(seed, 256, 256).mean(axis=2) for seed in range(4)], axis=0)
    amplitude = np.abs(np.fft.fft2(grey - grey.mean()))
    frequency = np.hypot(np.fft.fftfreq(256)[:, None], np.fft.fftfreq(256)[None])
    inside = (frequency > 0.02) & (frequency < 0.4)
    slope = np.polyfit(np.log(frequency[inside]), np.log(amplitude[inside] + 1e-9), 1)[0]
    assert -1.8 < slope < -0.7


def test_squares_for_raw_files() -> None:
    source = pictures.Pictures(2, side=64)
    assert source.image(1).size == (64, 64)
    assert len(source) == 2


class Answers:
    """An arm that answers from a list."""

    def __init__(self, *answers: list[float]) -> None:
        self.answers = list(answers)

    def ask(self, *words: str) -> list[float]:
        return self.answers.pop(0)


GOOD: tuple[list[float], ...] = ([0, 100], *([5.0, 7.0],) * 6)


@pytest.mark.parametrize("spoilt", [0, 2, 6])
def test_a_gate_that_fails_ends_the_measurement(tmp_path: Path, spoilt: int) -> None:
    answers = [list(answer) for answer in GOOD]
    answers[spoilt][0] += 1
    report = Report("loader", out=tmp_path)
    with pytest.raises(SystemExit) as stopped:
        loader.check(report, {loader.JPEG: Path("x")}, cast(Process, Answers(*answers)))
    assert stopped.value.code == 1


def test_gates_that_hold(tmp_path: Path) -> None:
    report = Report("loader", out=tmp_path)
    loader.check(report, {loader.JPEG: Path("x")}, cast(Process, Answers(*GOOD)))
    assert [row.met for row in report.rows] == [True] * 4


def test_accuracies_are_paired_by_seed() -> None:
    row: Any = filters.compared("m", "area", [50.0, 33.0], [40.0, 30.0])
    assert row.ratio == pytest.approx((1.25 + 1.1) / 2)
    assert (row.arm_value, row.peer_value, row.pairs) == (41.5, 35.0, 2)


def test_filter_runs_differ_in_the_filter_alone(tmp_path: Path) -> None:
    one, two = (filters.arguments(resize, 1, 20, 4, tmp_path, ["--data.val=0"]) for resize in ("ffcv", "area"))
    assert [(a, b) for a, b in zip(one, two, strict=True) if a != b] == [("--data.resize=ffcv", "--data.resize=area")]
