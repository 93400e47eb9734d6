"""`prepare`, `build` and `take`: from a config to the loaders of a rank."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import multiprocessing
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from utils import params
from utils.data import Loaders, beton, build, count_training, default_workers, open_split, prepare, take
from utils.data.order import Shard, epoch_order
from utils.data.resolve import resolve
from utils.data.splits import split, subset
from utils.params import Params
from utils.system.errors import UserError

CPU = torch.device("cpu")
FFCV = pytest.param("ffcv", marks=[pytest.mark.ffcv, pytest.mark.xdist_group("ffcv")])
KINDS = [FFCV, "device", "torchvision"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared by the tests that only read, so that .beton files are written once."""
    return tmp_path_factory.mktemp("data")


def config(root: Path, loader: str, batch_size: int = 100, seed: int = 0, **data: Any) -> Params:
    return Params(
        run=params.Run(seed=seed),
        data=params.Data(**{"name": "digits", "root": str(root), "loader": loader, "pad": 2, **data}),
        training=params.Training(batch_size=batch_size),
    )


def built(root: Path, loader: str, shard: Shard | None = None, **data: Any) -> Loaders:
    wanted = config(root, loader, **data)
    prepare(wanted)
    return build(wanted, shard or Shard(0, 1, wanted.training.batch_size), CPU, channels_last=False, workers=1)


def read(loader: Any) -> tuple[torch.Tensor, torch.Tensor]:
    batches = list(loader)
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


def digits(name: str) -> tuple[np.ndarray, np.ndarray]:
    source = open_split("digits", Path(), name)
    pixels = np.stack([np.asarray(source.image(index)) for index in range(len(source))])
    return pixels, source.labels


def plain(spec: Any, pixels: np.ndarray) -> np.ndarray:
    mean, std = (np.array(values, dtype=np.float32) for values in (spec.mean, spec.std))
    return ((pixels.astype(np.float32) - mean) / std).transpose(0, 3, 1, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_shows_the_same_images_in_the_same_order(root: Path, kind: str) -> None:
    loaders = built(root, kind, seed=4, augment="none", split_seed=2)
    assert loaders.loader == kind
    assert set(loaders.digests) == {"train", "test"}
    train_pixels, train_labels = digits("train")
    test_pixels, test_labels = digits("test")
    train, val = split(train_labels, 0.1, 2)
    assert loaders.val is not None
    assert (loaders.train.samples, loaders.val.samples, loaders.test.samples) == (1200, 144, 359)
    for loader, pixels, labels in [
        (loaders.test, test_pixels, test_labels),
        (loaders.val, train_pixels[val], train_labels[val]),
    ]:
        images, found = read(loader)
        assert found.tolist() == labels.tolist()
        np.testing.assert_array_equal(images.numpy(), plain(loaders.spec, pixels))
        assert next(len(labels) for _, labels in loader) == min(200, loader.samples)
    loaders.train.set_epoch(1, 3)
    images, found = read(loaders.train)
    order = train[epoch_order(4, 1, 3, len(train))][:1200]
    assert found.tolist() == train_labels[order].tolist()
    np.testing.assert_array_equal(images.numpy(), plain(loaders.spec, train_pixels[order]))
    loaders.close()


@pytest.mark.parametrize("kind", [FFCV, "torchvision"])
def test_the_augmentation_of_every_kind_is_that_of_device(root: Path, kind: str) -> None:
    """Images are stored raw and cropped without a filter, so that pixels agree bit for bit between the loaders."""
    pair = [built(root, one, flip=True, cutout=5, subset=400) for one in ("device", kind)]
    for loaders in pair:
        loaders.train.set_epoch(2, 1)
    expected, found = (read(loaders.train) for loaders in pair)
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[0], expected[0])
    for loaders in pair:
        loaders.close()


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_make_up_one(root: Path, kind: str) -> None:
    one = built(root, kind, subset=400)
    two = [built(root, kind, Shard(rank, 2, 100), subset=400) for rank in range(2)]
    whole, parts = list(one.train), [list(loaders.train) for loaders in two]
    assert len(whole) == len(parts[0]) == len(parts[1])
    for step, (images, labels) in enumerate(whole):
        assert torch.equal(torch.cat([part[step][0] for part in parts]), images)
        assert torch.equal(torch.cat([part[step][1] for part in parts]), labels)
    for kept in ("val", "test"):
        counts = [len(read(getattr(loaders, kept))[1]) for loaders in two]
        assert sum(counts) == getattr(one, kept).samples == getattr(two[0], kept).samples
    for loaders in (one, *two):
        loaders.close()


def test_seeds_of_order_and_split_are_apart_from_the_runs(root: Path) -> None:
    def first(**values: Any) -> list[int]:
        images, _ = next(iter(built(root, "device", augment="none", **values).train))
        return images.sum((1, 2, 3)).tolist()

    assert first(seed=1) == first(order_seed=1) == first(seed=5, order_seed=1)
    assert first(seed=1) != first(seed=2)
    assert first(seed=1, val=0.0) != first(seed=1)
    assert first(seed=1, split_seed=1) != first(seed=1)


def test_without_val_all_training_images_are_used(root: Path) -> None:
    loaders = built(root, "device", val=0.0, batch_size=1)
    assert loaders.val is None
    assert loaders.train.samples == 1438
    loaders.close()


def test_a_subset_leaves_val_and_test_alone(root: Path) -> None:
    loaders = built(root, "device", subset=200)
    assert loaders.val is not None
    assert (loaders.train.samples, loaders.val.samples, loaders.test.samples) == (200, 144, 359)
    whole = built(root, "device")
    assert whole.val is not None
    assert torch.equal(read(loaders.val)[0], read(whole.val)[0])


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"batch_size": 1295}, "training.batch_size=1295"),
        ({"batch_size": 1295}, "data.val=0.1"),
        ({"batch_size": 2000}, "training.batch_size=2000 is more than the 1294 training images; lower it"),
        ({"val": 1e-4}, "data.val"),
        ({"val": 0.999, "batch_size": 10}, "training.batch_size=10 is more than the 1 .*data.val=0.999"),
        ({"val": 0.99999}, "data.val=0.99999 holds out all"),
        ({"val": 0.99999, "subset": 10}, "data.val=0.99999 holds out all"),
        ({"subset": 5000}, "data.subset"),
        ({"subset": 50}, "training.batch_size=100 is more than the 50 .*data.subset=50"),
    ],
)
def test_too_few_images_are_refused_by_key(root: Path, values: dict[str, Any], key: str) -> None:
    for refuse in (lambda: built(root, "device", **values), lambda: count_training(config(root, "device", **values))):
        with pytest.raises(UserError, match=key) as caught:
            refuse()
        assert "\n" not in str(caught.value)


def test_training_images_are_counted_from_what_is_there(tmp_path: Path) -> None:
    assert count_training(config(tmp_path, "ffcv")) == 1294
    assert count_training(config(tmp_path, "ffcv", val=0.0, subset=300)) == 300
    for loader in ("ffcv", "device"):
        for name in ("cifar10", "imagenet", "imagenette"):
            assert count_training(config(tmp_path, loader, name=name)) is None
    assert list(tmp_path.rglob("*")) == []


def test_training_images_are_counted_from_the_beton_file_where_it_fits(tmp_path: Path) -> None:
    picture_folders(tmp_path, ("cat", "dog"), 30, 2)
    wanted = config(tmp_path, "ffcv", batch_size=4, name="folder", image_size=16)
    assert count_training(wanted) == 54
    beton.ensure(resolve(wanted.data), 1, download=False, progress=False)
    for image in tmp_path.rglob("*.png"):
        image.unlink()
    assert count_training(wanted) == 54
    path = beton.path_of(resolve(wanted.data), "train")
    path.write_bytes(path.read_bytes()[:-1])
    picture_folders(tmp_path, ("cat", "dog"), 20, 2)
    assert count_training(wanted) == 36


def scored(loaders: Loaders, per_class: int, batch_size: int, rank: int = 0, ranks: int = 1) -> list[Any]:
    """All micro-batches of one pass, after a look at a second one."""
    batches = loaders.scoring(per_class=per_class, batches=None, batch_size=batch_size, rank=rank, ranks=ranks)
    first, again = list(batches), list(batches)
    batches.close()
    assert len(batches) == len(first)
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(first, again, strict=True))
    return first


@pytest.mark.parametrize("kind", KINDS)
def test_scoring_batches_are_balanced_training_images_dealt_to_the_ranks(root: Path, kind: str) -> None:
    pixels, labels = digits("train")
    train, _ = split(labels, 0.1, 2)
    chosen = subset(train, labels, 400, 2)
    first, second = (built(root, kind, Shard(rank, 2, 100), split_seed=2, subset=400) for rank in range(2))
    batches = scored(first, 7, 16)
    assert [len(found) for _, found in batches] == [14, 14, 14, 14, 14]
    images, found = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert torch.bincount(found).tolist() == [7] * 10
    allowed = {
        (image.tobytes(), int(label))
        for image, label in zip(plain(first.spec, pixels[chosen]), labels[chosen], strict=True)
    }
    assert all((image.numpy().tobytes(), int(label)) in allowed for image, label in zip(images, found, strict=True))
    assert len({image.numpy().tobytes() for image in images}) > 65
    halves = scored(first, 7, 16, 0, 2), scored(second, 7, 16, 1, 2)
    assert [len(half) for half in halves] == [3, 2]
    for number, batch in enumerate(batches):
        dealt = halves[number % 2][number // 2]
        assert torch.equal(dealt[0], batch[0])
        assert torch.equal(dealt[1], batch[1])
    other = built(root, kind, Shard(0, 2, 100), split_seed=2, subset=400, order_seed=1)
    assert not torch.equal(scored(other, 7, 70)[0][0], images)
    assert [len(found) for _, found in scored(first, 1000, 300)] == [200, 200]
    assert not multiprocessing.active_children()
    for loaders in (first, second, other):
        loaders.close()


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_of_unequal_sizes_are_the_same_in_every_kind(root: Path, kind: str) -> None:
    loaders = built(root, kind)
    plain_list = built(root, "device")
    ours, theirs = (
        loaders.scoring(per_class=None, batches=3, batch_size=33, rank=0, ranks=1) for loaders in (loaders, plain_list)
    )
    assert (ours.count, ours.samples, len(ours)) == (3, 99, 3)
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine[0], other[0])
        assert torch.equal(mine[1], other[1])
    turned = build(config(root, kind), Shard(0, 1, 100), CPU, channels_last=True, workers=1)
    for per_class, batch_size in [(5, 16), (6, 20)]:
        for images, _ in scored(turned, per_class, batch_size):
            assert images.is_contiguous(memory_format=torch.channels_last)
    uneven = [len(found) for _, found in scored(loaders, 5, 16)]
    assert uneven == [13, 13, 12, 12]
    with pytest.raises(
        UserError, match=r"pruning.batches=13 of pruning.batch_size=100 is 1300 images and there are 1294"
    ):
        loaders.scoring(per_class=None, batches=13, batch_size=100, rank=0, ranks=1)
    for one in (ours, theirs, loaders, plain_list, turned):
        one.close()


def test_the_default_evaluation_batch_is_twice_the_training_batch_of_a_rank(root: Path) -> None:
    wanted = config(root, "device", batch_size=40)
    loaders = build(wanted, Shard(0, 2, 40), CPU, False, 1)
    assert len(next(iter(loaders.test))[1]) == 40
    wanted = dataclasses.replace(wanted, training=params.Training(batch_size=40, eval_batch_size=7))
    assert len(next(iter(build(wanted, Shard(0, 2, 40), CPU, False, 1).test))[1]) == 7


def without_ffcv(name: str, *rest: Any) -> Any:
    return None if name == "ffcv" else FIND_SPEC(name, *rest)


FIND_SPEC = importlib.util.find_spec


def test_without_ffcv_the_fallback_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", without_ffcv)
    with caplog.at_level(logging.WARNING):
        for rank in range(2):
            loaders = built(tmp_path, "ffcv", Shard(rank, 2, 100))
            assert loaders.loader == "torchvision"
    (warning,) = caplog.messages
    assert "ffcv is not installed" in warning
    assert "pip install ffcv" in warning
    assert "\n" not in warning
    assert not (tmp_path / "betons").exists()
    assert len(take(loaders.train, 1)[0][1]) == 50


@pytest.mark.ffcv
@pytest.mark.xdist_group("ffcv")
def test_prepare_writes_betons_and_keeps_torchs_threads(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    built(tmp_path, "ffcv").close()
    assert len(list((tmp_path / "betons").glob("digits-*.beton"))) == 2
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("kind", KINDS)
def test_missing_data_is_refused_before_anything_is_written(tmp_path: Path, kind: str) -> None:
    wanted = config(tmp_path, kind, name="imagewoof")
    with pytest.raises(UserError, match=str(tmp_path / "imagewoof")):
        prepare(wanted)
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.ffcv
@pytest.mark.xdist_group("ffcv")
def test_one_process_of_a_node_writes_with_all_cpus_and_compares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, bool]] = []
    monkeypatch.setattr(beton, "ensure", lambda spec, workers, download, compare: calls.append((workers, compare)))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    for local_rank in range(2):
        for name, value in {
            "RANK": local_rank,
            "WORLD_SIZE": 2,
            "LOCAL_RANK": local_rank,
            "LOCAL_WORLD_SIZE": 2,
        }.items():
            monkeypatch.setenv(name, str(value))
        prepare(config(tmp_path, "ffcv"))
    prepare(config(tmp_path, "ffcv", workers=3))
    assert calls == [(8, True), (8, False), (3, False)]


def test_workers_are_capped_to_the_allowed_cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2})
    assert [default_workers(ranks) for ranks in (1, 2, 3, 8)] == [3, 1, 1, 1]
    loaders = build(config(tmp_path, "torchvision"), Shard(0, 1, 100), CPU, False, workers=64)
    assert loaders.train._workers == 3  # type: ignore[attr-defined]


def picture_folders(root: Path, classes: tuple[str, ...], train: int, val: int) -> None:
    draws = np.random.default_rng(0)
    for part, count in (("train", train), ("val", val)):
        for label in classes:
            for number in range(count):
                path = root / part / label / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                size = (*draws.integers(20, 40, 2), 3)
                Image.fromarray(draws.integers(0, 256, size, dtype=np.uint8)).save(path)


@pytest.mark.parametrize("name", ["device", "torchvision"])
def test_a_folder_of_images_runs_end_to_end(tmp_path: Path, name: str) -> None:
    picture_folders(tmp_path, ("cat", "dog", "emu"), 6, 2)
    loaders = built(tmp_path, name, name="folder", image_size=16, batch_size=4, val=0.2)
    assert loaders.spec.classes == 3
    assert loaders.val is not None
    assert (loaders.train.samples, loaders.val.samples, loaders.test.samples) == (12, 4, 6)
    images, labels = read(loaders.test)
    assert images.shape == (6, 3, 16, 16)
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]
    first = loaders.digests["test"]
    (tmp_path / "val" / "emu" / "0.png").write_bytes(b"broken")
    broken = built(tmp_path, "torchvision", name="folder", image_size=16, batch_size=4, val=0.2)
    assert broken.digests["test"] != first
    with pytest.raises(UserError, match=r"val/emu/0\.png"):
        list(broken.test)


@pytest.mark.parametrize("kind", KINDS)
def test_take_gives_the_first_batches_and_ends_the_iteration(root: Path, kind: str) -> None:
    loaders = built(root, kind)
    loaders.train.set_epoch(0, 1)
    batches = take(loaders.train, 3)
    loaders.train.set_epoch(0, 1)
    for (images, labels), expected in zip(batches, loaders.train, strict=False):
        assert torch.equal(images, expected[0])
        assert torch.equal(labels, expected[1])
    loaders.train.set_epoch(0, 1, start_batch=10)
    with pytest.raises(UserError, match="3 training batches are wanted and there are 2"):
        take(loaders.train, 3)
    loaders.close()
    assert not multiprocessing.active_children()
