"""The cost model against cases computed by hand, and its command."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from benchmarks import cost, cost_check
from benchmarks.cost import Parts
from benchmarks.measure import Report

PLAIN = Parts(train_rate=100.0, eval_rate=300.0, parameters=1_000_000, prunable=900_000, images=1050, eval_images=600)


def test_a_step_is_the_slower_of_computing_and_loading() -> None:
    assert cost.step(PLAIN, 20, 1, 8) == pytest.approx(0.2)
    assert cost.step(dataclasses.replace(PLAIN, launch=0.5), 20, 1, 8) == pytest.approx(0.5)
    slow = dataclasses.replace(PLAIN, loader_rate=10.0, cores=4.0, overlap=0.8)
    assert cost.loading(slow, 20) == pytest.approx(0.5)
    assert cost.step(slow, 20, 1, 8) == pytest.approx(0.5 / 0.8)
    assert cost.step(slow, 20, 2, 8) == pytest.approx(0.25 / 0.8)


def test_rings_within_and_between_nodes() -> None:
    linked = dataclasses.replace(PLAIN, local_link=8e6, link=1e6, latency=0.001)
    assert cost.reduction(linked, 1, 4) == 0.0
    # 4 MB; two ranks: 2 * 1/2 * 4e6 / 8e6, and two messages
    assert cost.reduction(linked, 2, 4) == pytest.approx(0.5 + 0.002)
    # four within a node: 2 * 3/4 * 0.5, six messages; two nodes: 2 * 1/2 * 4, two messages
    assert cost.reduction(linked, 8, 4) == pytest.approx(0.75 + 0.006 + 4.0 + 0.002)
    assert cost.reduction(linked, 8, 1) == pytest.approx(2 * 7 / 8 * 4.0 + 0.014)
    assert cost.reduction(PLAIN, 8, 4) == 0.0


def test_packed_gradients_send_what_is_kept_and_what_no_mask_covers() -> None:
    linked = dataclasses.replace(PLAIN, link=1e6, pack=1e-7)
    assert cost.entries(linked, 0.1) == pytest.approx(190_000)
    assert cost.reduction(linked, 2, 1, 0.1) == pytest.approx(0.76)
    exposed = dataclasses.replace(linked, backward=0.0)
    assert cost.step(exposed, 20, 2, 1, 0.1) == pytest.approx(0.1 + 0.76 + 0.019)
    assert cost.step(exposed, 20, 2, 1) == pytest.approx(0.1 + 4.0)
    assert cost.step(exposed, 20, 1, 1, 0.1) == pytest.approx(0.2)  # nothing is packed for oneself


def test_reduction_hides_behind_the_backward_pass_but_for_the_last_bucket() -> None:
    linked = dataclasses.replace(PLAIN, link=4e6, exposed=1e6)
    # 1 s of sending, 10 s of computing: a quarter of the bytes is the last bucket
    assert cost.step(linked, 2000, 2, 1) == pytest.approx(10.0 + 0.25)
    # 0.6 s of computing: 0.4 s of it hide something, 0.6 s show
    assert cost.step(linked, 120, 2, 1) == pytest.approx(0.6 + 0.6)
    assert cost.step(dataclasses.replace(linked, exposed=1e9), 2000, 2, 1) == pytest.approx(11.0)


def test_an_epoch_drops_the_last_images_and_evaluates_all() -> None:
    # 1050 // 100 = 10 steps of 1 s, 600 images at 300/s, and 3 s more
    assert cost.epoch(dataclasses.replace(PLAIN, epoch=3.0), 100, 1, 8) == pytest.approx(10.0 + 2.0 + 3.0)
    assert cost.epoch(PLAIN, 100, 4, 8) == pytest.approx(2.5 + 0.5)
    slow = dataclasses.replace(PLAIN, loader_rate=50.0)
    assert cost.epoch(slow, 100, 1, 8) == pytest.approx(20.0 + 12.0)


def test_a_run_adds_levels_and_packs_below_a_density() -> None:
    parts = dataclasses.replace(PLAIN, link=1e6, backward=0.0, change=5.0, start=100.0, eval_images=0)
    assert cost.geometric(3) == pytest.approx([1.0, 0.8, 0.64])
    dense, packed = 10 * (0.5 + 4.0), 10 * (0.5 + 4 * (1 - 0.5 * 0.9))
    assert cost.run(parts, 100, 2, 1, [1.0, 0.5], 2) == pytest.approx(100 + 2 * (2 * dense + 5))
    assert cost.run(parts, 100, 2, 1, [1.0, 0.5], 2, 0.5) == pytest.approx(100 + 2 * dense + 2 * packed + 10)


def test_the_command_prints_parts_with_sources_and_a_row_per_rank_count(
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--ranks", "1", "8", "--images", "1024000", "--batch", "1000", "--train-rate", "2000"]
    assert cost.main([*options, "--overlap", "1", "--eval-images", "0", "--epoch", "0", "--loader-rate", "1e9"]) == 0
    text = capsys.readouterr().out
    assert "train_rate = 2000  (given)" in text
    assert "link = 1.125e+10  (estimated" in text
    first = next(line for line in text.splitlines() if line.startswith("| 1 |"))
    cells = [cell.strip() for cell in first.strip("| ").split("|")]
    # 1024 steps of half a second; 25 levels of 90 such epochs and 10 s, after a minute
    assert cells[:3] == ["1", "1000", "500.00"]
    assert cells[5:] == ["500.00", "2,000", "512.0", f"{(60 + 25 * (90 * 512 + 10)) / 3600:.2f}"]
    assert "| 8 | 1000 | 62.50 |" in text


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--ranks", "2048", "--batch", "1024"], "--batch 1024"),
        (["--ranks", "0"], "--batch 1024"),
        (["--link", "0"], "--link 0.0"),
        (["--train-rate", "-3"], "--train-rate -3.0"),
        (["--batch-per-rank", "64", "--batch", "3"], "not allowed with"),
    ],
)
def test_numbers_that_cannot_be_are_named(options: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cost.main(options)
    assert ended.value.code == 2
    assert named in capsys.readouterr().err


def test_every_preset_has_a_source_of_known_kind() -> None:
    kinds = ("published: ", "measured: ", "estimated")
    for parts in cost.PRESETS.values():
        for field in dataclasses.fields(Parts):
            value = getattr(parts, field.name)
            if value != field.default and field.name not in ("parameters", "prunable"):
                source = cost.SOURCES[field.name]
                assert any(kind in source for kind in kinds), field.name


def test_the_check_compares_epochs_with_those_of_runs(tmp_path: Path) -> None:
    """Runs that go as the model says, worked out by hand: all ratios are 1 but that of the slow epoch."""
    assert cost_check.BATCH == 16
    one = Parts(train_rate=16.0, eval_rate=391.0, parameters=1_000_000, prunable=1_000_000, backward=0.0)
    two = dataclasses.replace(one, train_rate=8.0, eval_rate=195.5, local_link=8e6)
    # 10 steps of 1 s, 1 s of evaluation; on two 10 steps of 1 s and half a second of reduction
    alone = cost_check.Run([11.0] * 4, [16.0] * 4, levels=50.0, wall=70.0, steps=10)
    both = cost_check.Run([32.0, 32.0, 32.0, 16.0], [16 / 1.5] * 4, levels=0.0, wall=20 + 4 * 16.0 + 6.0, steps=10)
    report = Report("cost_check", out=tmp_path)
    cost_check.compare(report, {1: one, 2: two}, {1: alone, 2: both})
    assert [row.ratio for row in report.rows] == pytest.approx([1.0, 1.0, 1.0, 1.0, 0.5, 1.0])
