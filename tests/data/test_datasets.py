"""Data sets: class folders, published files, and clear refusals of what is missing, damaged or contradictory."""

from __future__ import annotations

import hashlib
import pickle
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torchvision.datasets as published
from PIL import Image

from utils.data.datasets import dataset, open_split
from utils.system.errors import UserError
from utils.system.registry import declared


def colour(number: int) -> tuple[int, int, int]:
    return (number % 256, number * 7 % 256, number * 13 % 256)


def write(path: Path, number: int = 0, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour(number)).convert(mode).save(path)


def folders(root: Path, classes: Iterable[str], splits: Iterable[str] = ("train", "test"), count: int = 2) -> Path:
    number = 0
    for split in splits:
        for name in classes:
            for image in range(count):
                write(root / split / name / f"{image}.png", number)
                number += 1
    return root


def message(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_every_name_is_declared_with_its_traits() -> None:
    names = {"cifar10", "cifar100", "svhn", "tiny_imagenet", "imagenette", "imagewoof", "imagenet", "folder", "digits"}
    assert set(dataset.names()) == names == set(declared("dataset"))
    wanted = {"classes", "size", "augment", "flip", "mean", "std", "max_resolution", "eval_ratio"}
    assert all(set(dataset.entry(name).traits) == wanted for name in names)
    assert not dataset.entry("svhn").traits["flip"]


def test_an_unknown_name_is_refused_with_the_nearest(tmp_path: Path) -> None:
    assert "cifar10" in message(lambda: open_split("cifar1O", tmp_path, "train"))
    with pytest.raises(ValueError, match="split"):
        open_split("folder", tmp_path, "val")


def test_class_folders_are_listed_sorted_and_hidden_and_other_files_ignored(tmp_path: Path) -> None:
    root = folders(tmp_path, ["zebra", "ape", "Bee"])
    write(root / "train" / "ape" / ".hidden.png")
    write(root / "train" / ".cache" / "x.png")
    write(root / "train" / "ape" / ".cache" / "x.png")
    (root / "train" / "ape" / "notes.txt").write_text("no image")
    (root / "train" / "stray.png").write_bytes(b"")
    write(root / "train" / "ape" / "deeper" / "10.JPEG", 99)
    source = open_split("folder", root, "train")
    assert source.classes == ["Bee", "ape", "zebra"]
    expected = ["Bee/0.png", "Bee/1.png", "ape/0.png", "ape/1.png", "ape/deeper/10.JPEG", "zebra/0.png", "zebra/1.png"]
    assert [str(source.path(index).relative_to(root / "train")) for index in range(len(source))] == expected
    assert source.labels.tolist() == [0, 0, 1, 1, 1, 2, 2]
    assert source.labels.dtype == np.int64
    image = source.image(2)
    assert image.mode == "RGB"
    assert image.getpixel((0, 0)) == colour(2)


def test_val_serves_as_test_and_test_comes_first(tmp_path: Path) -> None:
    root = folders(tmp_path, ["a", "b"], ["train", "val"])
    assert open_split("folder", root, "test").path(0).parent.parent.name == "val"
    folders(root, ["a", "b"], ["test"])
    assert open_split("folder", root, "test").path(0).parent.parent.name == "test"


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1"])
def test_other_colour_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    root = folders(tmp_path, ["a"], count=1)
    write(root / "train" / "a" / "0.png", 50, mode=mode)
    assert open_split("folder", root, "train").image(0).mode == "RGB"


def test_missing_folders_and_empty_classes_are_refused_by_name(tmp_path: Path) -> None:
    assert str(tmp_path / "train") in message(lambda: open_split("folder", folders(tmp_path, ["a"], ["test"]), "train"))
    root = folders(tmp_path / "other", ["a", "b"], ["train"])
    for split in ("train", "test"):
        text = message(lambda split=split: open_split("folder", root, split))
        assert str(root / "test") in text
        assert str(root / "val") in text
    folders(root, ["a", "b"], ["test"])
    shutil.rmtree(root / "test" / "b")
    (root / "test" / "b").mkdir()
    assert str(root / "test" / "b") in message(lambda: open_split("folder", root, "test"))
    (root / "test" / "b").rmdir()
    assert "'b' is only in" in message(lambda: open_split("folder", root, "train"))
    (tmp_path / "bare" / "train").mkdir(parents=True)
    (tmp_path / "bare" / "test").mkdir(parents=True)
    assert "holds no class folders" in message(lambda: open_split("folder", tmp_path / "bare", "train"))


@pytest.mark.parametrize("damage", [b"", b"not an image", None], ids=["empty", "foreign", "truncated"])
def test_a_corrupt_image_is_refused_by_name(tmp_path: Path, damage: bytes | None) -> None:
    root = folders(tmp_path, ["a"], count=1)
    path = root / "train" / "a" / "0.png"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:2000] if damage is None else damage)
    assert str(path) in message(lambda: open_split("folder", root, "train").image(0))


def test_the_digest_follows_names_sizes_and_labels(tmp_path: Path) -> None:
    def digest(root: Path) -> str:
        return open_split("folder", root, "train").digest()

    first = digest(folders(tmp_path / "one", ["a", "b"]))
    assert digest(folders(tmp_path / "two", ["a", "b"])) == first
    write(tmp_path / "two" / "train" / "a" / "0.png", 0, (50, 70))
    changed = digest(tmp_path / "two")
    (tmp_path / "two" / "train" / "a" / "1.png").rename(tmp_path / "two" / "train" / "a" / "7.png")
    assert len({first, changed, digest(tmp_path / "two"), digest(folders(tmp_path / "three", ["a", "c"]))}) == 4


def test_cifar10_and_svhn_read_class_folders_with_the_right_number_of_classes(tmp_path: Path) -> None:
    for name in ("cifar10", "svhn"):
        root = folders(tmp_path / name, [str(digit) for digit in range(10)], count=1)
        assert open_split(name, root, "test").labels.tolist() == list(range(10))
    shutil.rmtree(root / "train" / "3")
    shutil.rmtree(root / "test" / "3")
    text = message(lambda: open_split("svhn", root, "train"))
    assert "9 classes, not 10" in text
    assert "data.name=folder" in text


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def cifar_files(root: Path, maker: type, label_key: str, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Files laid out as CIFAR's own, with torchvision's checksums replaced by theirs. Returns all images."""
    base = root / maker.base_folder
    base.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (20, 3, 32, 32), dtype=np.uint8)
    lists: dict[str, list[list[str]]] = {"train_list": [], "test_list": []}
    for kind, name, part in (("train_list", "one", slice(0, 10)), ("test_list", "two", slice(10, 20))):
        content = {"data": images[part].reshape(10, -1), label_key: list(range(9, -1, -1))}
        (base / name).write_bytes(pickle.dumps(content))
        lists[kind].append([name, md5(base / name)])
    names = [f"class {label:02}" for label in range(100 if label_key == "fine_labels" else 10)]
    key = maker.meta["key"]
    (base / "names").write_bytes(pickle.dumps({key: names}))
    for kind, entries in lists.items():
        monkeypatch.setattr(maker, kind, entries)
    monkeypatch.setattr(maker, "meta", {"filename": "names", "key": key, "md5": md5(base / "names")})
    return images


@pytest.mark.parametrize(("name", "key"), [("cifar10", "labels"), ("cifar100", "fine_labels")])
def test_cifar_reads_its_published_files(tmp_path: Path, name: str, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    maker = getattr(published, name.upper())
    images = cifar_files(tmp_path, maker, key, monkeypatch)
    for split, first in (("train", 0), ("test", 10)):
        source = open_split(name, tmp_path, split)
        assert source.labels.tolist() == list(range(9, -1, -1))
        assert source.classes[1] == "class 01"
        np.testing.assert_array_equal(np.asarray(source.image(3)), images[first + 3].transpose(1, 2, 0))
    digests = {open_split(name, tmp_path, split).digest() for split in ("train", "test")}
    assert len(digests) == 2


def test_a_damaged_published_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cifar_files(tmp_path, published.CIFAR10, "labels", monkeypatch)
    with open(tmp_path / "cifar-10-batches-py" / "one", "ab") as handle:
        handle.write(b"x")
    assert "no whole copy of CIFAR10" in message(lambda: open_split("cifar10", tmp_path, "train"))


def test_svhn_reads_its_published_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scipy.io import savemat

    images = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 5), dtype=np.uint8)
    savemat(tmp_path / "train.mat", {"X": images, "y": np.array([[10], [1], [2], [9], [10]])})
    entry = ["", "train.mat", md5(tmp_path / "train.mat")]
    monkeypatch.setattr(published.SVHN, "split_list", {"train": entry})
    source = open_split("svhn", tmp_path, "train")
    assert source.labels.tolist() == [0, 1, 2, 9, 0]  # the published label of digit 0 is 10
    np.testing.assert_array_equal(np.asarray(source.image(2)), images[..., 2])


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn", "imagenette"])
def test_missing_files_say_how_to_get_them(tmp_path: Path, name: str) -> None:
    text = message(lambda: open_split(name, tmp_path / name, "train"))
    assert str(tmp_path / name) in text
    assert "data.download=true" in text
    assert "data.root" in text
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("name", ["tiny_imagenet", "imagewoof", "imagenet"])
def test_what_cannot_be_downloaded_says_what_to_put_where(tmp_path: Path, name: str) -> None:
    text = message(lambda: open_split(name, tmp_path / name, "train", download=True))
    assert str(tmp_path / name) in text
    assert "put there" in text
    assert "data.root" in text
    assert "train/" in text


def test_a_failed_download_is_one_line_that_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: object) -> None:
        raise OSError("<urlopen error no route>")

    monkeypatch.setattr(published.CIFAR10, "download", refuse)
    text = message(lambda: open_split("cifar10", tmp_path / "cifar10", "train", download=True))
    assert "no route" in text
    assert list(tmp_path.rglob("*")) == []
    assert str(tmp_path / "cifar10") in text


class FakeImagenette:
    """Stands in for torchvision's: makes the folder it would unpack, or is interrupted half way."""

    interrupted = False

    def __init__(self, root: str, size: str, download: bool) -> None:
        assert (size, download) == ("320px", True)
        split = Path(root) / "imagenette2-320"
        folders(split, [f"n{label:02}" for label in range(10)], ["train"], 1)
        if self.interrupted:
            raise KeyboardInterrupt
        folders(split, [f"n{label:02}" for label in range(10)], ["val"], 1)


def test_imagenette_is_downloaded_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published, "Imagenette", FakeImagenette)
    monkeypatch.setattr(FakeImagenette, "interrupted", True)
    with pytest.raises(KeyboardInterrupt):
        open_split("imagenette", tmp_path, "train", download=True)
    assert list(tmp_path.rglob("*")) == []
    assert "no data set" in message(lambda: open_split("imagenette", tmp_path, "train"))
    monkeypatch.setattr(FakeImagenette, "interrupted", False)
    assert len(open_split("imagenette", tmp_path, "train", download=True)) == 10
    assert len(open_split("imagenette", tmp_path, "test")) == 10
    assert not (tmp_path / ".partial").exists()


def tiny_imagenet_files(root: Path) -> list[str]:
    """As distributed: train/<wnid>/images, val/images with val_annotations.txt, and an unlabelled test folder."""
    names = [f"n{label:08}" for label in range(200)]
    for label, name in enumerate(names):
        write(root / "train" / name / "images" / f"{name}_0.JPEG", label)
        (root / "train" / name / f"{name}_boxes.txt").write_text("")
    write(root / "test" / "images" / "test_0.JPEG")
    lines = []
    for image in range(5):
        write(root / "val" / "images" / f"val_{image}.JPEG", 200 + image)
        lines.append(f"val_{image}.JPEG\t{names[image * 40]}\t0\t32\t44\t62")
    (root / "val" / "val_annotations.txt").write_text("\n".join(reversed(lines)) + "\n")
    return names


def test_tiny_imagenet_as_distributed(tmp_path: Path) -> None:
    place = tmp_path / "tiny-imagenet-200"
    names = tiny_imagenet_files(place)
    train, test = (open_split("tiny_imagenet", tmp_path, split) for split in ("train", "test"))
    assert train.labels.tolist() == list(range(200))
    assert train.classes == test.classes == names
    assert test.labels.tolist() == [0, 40, 80, 120, 160]
    assert [test.path(index).name for index in range(5)] == [f"val_{image}.JPEG" for image in range(5)]
    annotations = place / "val" / "val_annotations.txt"
    annotations.write_text(annotations.read_text().replace("val_3.JPEG\tn00000120\t0\t32\t44\t62\n", ""))
    assert "val_3.JPEG" in message(lambda: open_split("tiny_imagenet", tmp_path, "test"))
    annotations.write_text("val_0.JPEG\tnowhere\n")
    assert "line 1" in message(lambda: open_split("tiny_imagenet", tmp_path, "test"))


def test_tiny_imagenet_as_class_folders(tmp_path: Path) -> None:
    folders(tmp_path, [f"n{label:03}" for label in range(200)], ["train", "val"], 1)
    assert open_split("tiny_imagenet", tmp_path, "test").labels.tolist() == list(range(200))


def test_imagenet_takes_val_even_where_unlabelled_test_images_lie(tmp_path: Path) -> None:
    folders(tmp_path, [f"n{label:04}" for label in range(1000)], ["train", "val"], 1)
    write(tmp_path / "test" / "ILSVRC2012_test_00000001.JPEG")
    assert len(open_split("imagenet", tmp_path, "test")) == 1000


def test_digits_hold_all_1797_images(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    train, test = (open_split("digits", tmp_path, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (1438, 359)
    bundle = load_digits()
    assert sorted([*train.labels, *test.labels]) == sorted(bundle.target)
    shares = np.bincount(test.labels) / np.bincount(bundle.target)
    assert np.abs(shares - 0.2).max() < 0.01
    images = np.stack([np.asarray(source.image(i)) for source in (train, test) for i in range(len(source))])
    assert images.shape == (1797, 16, 16, 3)
    assert (images[..., 0] == images[..., 1]).all()
    # Every original shrinks back out of exactly one of them: nothing is lost, doubled or mislabelled.
    small = images[..., 0].reshape(1797, 8, 2, 8, 2).mean((2, 4))
    labels = np.array([*train.labels, *test.labels])
    original = bundle.images * (255 / 16)
    distance = ((original**2).sum((1, 2))[:, None] + (small**2).sum((1, 2))) - 2 * np.einsum(
        "ayx,byx->ab", original, small
    )
    nearest = distance.argmin(1)
    assert len(set(nearest)) == 1797
    assert (labels[nearest] == bundle.target).all()
    assert abs(images[:1438].mean() - dataset.entry("digits").traits["mean"][0]) < 0.01
    assert abs(images[:1438].std() - dataset.entry("digits").traits["std"][0]) < 0.01
