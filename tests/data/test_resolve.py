"""`resolve`: every auto of the data section settled, contradictions refused by key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from utils import params
from utils.data.datasets import dataset
from utils.data.resolve import resolve
from utils.system.errors import ParamError, UserError


def test_named_data_sets_settle_to_their_traits() -> None:
    for name in dataset.names():
        if name == "folder":
            continue
        traits = dataset.entry(name).traits
        spec = resolve(params.Data(name=name, root="here"))
        assert spec.directory == Path("here") / name
        assert spec.betons == Path("here/betons")
        for key in ("classes", "augment", "flip", "mean", "std", "max_resolution", "eval_ratio"):
            assert getattr(spec, key) == traits[key], (name, key)
        assert spec.image_size == spec.eval_size == traits["size"]
        assert spec.write_mode == ("raw" if traits["max_resolution"] <= 64 else "jpg")


def test_what_is_given_wins() -> None:
    data = params.Data(
        name="svhn",
        betons="/b",
        image_size=40,
        eval_size=48,
        augment="none",
        flip=True,
        write_mode="jpg",
        max_resolution=50,
    )
    spec = resolve(data)
    assert (spec.betons, spec.image_size, spec.eval_size, spec.augment) == (Path("/b"), 40, 48, "none")
    assert (spec.flip, spec.write_mode, spec.max_resolution) == (True, "jpg", 50)
    assert spec.data is data


def test_stored_images_are_large_enough_for_what_is_asked_of_them() -> None:
    assert resolve(params.Data(name="imagenette", image_size=400)).max_resolution == 458  # 400 / 0.875, rounded up
    assert resolve(params.Data(name="cifar10", image_size=224)).max_resolution == 32  # there is no more in its images


@pytest.mark.parametrize(
    ("size", "expected"),
    [(None, (224, "rrc", 0.875, 500, "jpg")), (32, (32, "crop", 1.0, 64, "raw")), (64, (64, "crop", 1.0, 128, "jpg"))],
)
def test_a_folder_is_scanned_for_classes_and_settled_by_size(tmp_path: Path, size: int | None, expected: tuple) -> None:
    for name in ("a", "b", "c", ".hidden"):
        (tmp_path / "train" / name).mkdir(parents=True)
    spec = resolve(params.Data(name="folder", root=str(tmp_path), image_size=size))
    assert spec.classes == 3
    assert spec.directory == tmp_path
    assert (spec.image_size, spec.augment, spec.eval_ratio, spec.max_resolution, spec.write_mode) == expected


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=str(tmp_path / "no" / "train")):
        resolve(params.Data(name="folder", root=str(tmp_path / "no")))


@pytest.mark.parametrize(
    "values",
    [
        {"progressive_size": 33},
        {"progressive_epochs": (0.5,)},
        {"progressive_epochs": (0.8, 0.2)},
        {"cutout": 64},
        {"pad": 32},
        {"randaugment": 2, "loader": "device"},
        {"randaugment": 2, "loader": "ffcv"},
    ],
)
def test_contradictions_are_refused_by_key(values: dict[str, Any]) -> None:
    with pytest.raises(ParamError, match=rf"data\.{next(iter(values))}"):
        resolve(params.Data(**values))


def test_progressive_sizes_grow_in_sixteens_to_the_image_size() -> None:
    spec = resolve(params.Data(name="imagenet", progressive_size=100, progressive_epochs=(0.2, 0.8)))
    sizes = [spec.size_at(progress / 100) for progress in range(101)]
    assert sizes[0] == sizes[20] == 96
    assert sizes[80] == sizes[100] == 224
    assert sizes == sorted(sizes)
    assert all(size % 16 == 0 for size in sizes)
    assert resolve(params.Data(progressive_size=4)).size_at(0.0) == 16
    assert resolve(params.Data()).size_at(0.5) is None


def test_a_folder_that_is_missing_or_holds_one_class_is_refused_in_one_line(tmp_path: Path) -> None:
    for root, words in ((tmp_path / "nowhere", r"nowhere.*data\.root"), (tmp_path, "one class, 'a'")):
        (tmp_path / "train" / "a").mkdir(parents=True, exist_ok=True)
        with pytest.raises(UserError, match=words) as caught:
            resolve(params.Data(name="folder", root=str(root)))
        assert "\n" not in str(caught.value)
