"""One loader on several threads and the training it feeds: arithmetic, arms, and the command on a CPU."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from benchmarks import feeding, loader, loader_arms, measure, pictures
from benchmarks.feeding import Feed, Feeding
from benchmarks.measure import Report
from utils.data import beton

CPU = torch.device("cpu")
FEED = Feed("cifar/resnet20", 32, 4, 12, 1, CPU, torch.float32)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("feeding") / "jpg.beton"
    beton.write(pictures.Pictures(5, side=None), found, loader_arms.spec_of("jpg"), 1)
    return found


def test_the_slower_of_the_parts_is_the_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    seconds = {"fed": 5.0, "step": 4.0, "loader": 3.0}

    def cost(work, clock) -> float:
        work()
        return seconds[ran[-1]]

    monkeypatch.setattr(measure, "cost", cost)
    costs = feeding.in_turn([lambda name=name: ran.append(name) for name in seconds], 2)  # type: ignore[misc]
    assert costs == [(5.0, 4.0, 3.0)] * 2
    assert ran == ["loader", "step", "fed", "fed", "step", "loader", "loader", "step", "fed"]
    assert feeding.overlap(costs).gains == [0.8, 0.8]
    assert feeding.overlap([(5.0, 3.0, 4.5)]).gains == [0.9]


def test_a_fed_loop_trains_on_what_the_loader_gives(path: Path) -> None:
    arms = Feeding(path, FEED)
    lying, before = arms.lying, arms.arm.model.get_parameter("conv1.weight").detach().clone()
    arms.loaded()
    assert arms.seen == 12
    assert torch.equal(arms.arm.model.get_parameter("conv1.weight"), before)
    arms.fed()
    assert (arms.seen, arms.epoch) == (24, 2)
    images, labels = arms.arm.batch
    assert images.shape == (4, 3, 32, 32)
    assert labels.max() < 10
    assert not torch.equal(images, lying[0])
    fed = arms.arm.model.get_parameter("conv1.weight").detach().clone()
    assert not torch.equal(fed, before)
    arms.alone()
    assert arms.arm.batch[0] is lying[0]
    assert not torch.equal(arms.arm.model.get_parameter("conv1.weight"), fed)
    arms.close()


def test_images_that_do_not_come_end_the_measurement(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Feeding, "loaded", lambda self: sum(1 for _ in range(10_000)) and None)
    with pytest.raises(SystemExit):
        feeding.overlap_row(Report("loader", out=tmp_path), path, FEED, 1)


def test_the_gpu_is_fed_whole_batches() -> None:
    found = feeding.Feed("m", 224, feeding.BATCH, feeding.whole(1000 * 3), 3, CPU, torch.float32)
    assert found.images == 3072
    assert feeding.feed_of(CPU, 2, 1024).images == feeding.FEW


def test_the_command_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeding, "FEW", 32)
    assert loader.main(f"--images 64 --workers 2 --device cpu --each 128 --rounds 1 --out {tmp_path}".split()) == 0
    with open(tmp_path / "loader.csv", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    gates = [row for row in rows if row["measurement"].startswith("gate")]
    assert len(gates) == 2
    threads, _, _, overlap = rows[1:2] + rows[3:]
    assert "2 threads, wall clock" in threads["measurement"]
    assert threads["target"] == overlap["target"] == ""
    assert (overlap["arm"], overlap["peer"], overlap["pairs"]) == ("fed", "the slower alone", "1")


def test_more_threads_than_cpus_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        loader.main(["--workers", "100000", "--out", str(tmp_path)])
    assert stopped.value.code == 2
    assert "--workers 100000: this process may use 1 to" in capsys.readouterr().err
