"""Writing .beton files: their bytes and names, their sidecars, and writers that fail."""

from __future__ import annotations

import json
import os
import signal
import struct
from pathlib import Path

import numpy as np
import pytest

from tests.data.beton_cases import CLASS_NAMES, Pictures, spec_of
from utils.data import beton, beton_format
from utils.system.errors import UserError


def raiser(error: BaseException):
    def act(*_: object) -> None:
        raise error

    return act


def stored(path: Path) -> list[bytes]:
    """Every image's bytes, read with nothing but struct: header, two descriptors, 24-byte records, table at the end."""
    blob = path.read_bytes()
    version, fields, _, samples, table = struct.unpack_from("<HHIQQ", blob)
    assert (version, fields) == (2, 2)
    sizes = {}
    for i in range(samples):
        _, pointer, size = struct.unpack_from("<QQQ", blob, table + 24 * i)
        sizes[pointer] = size
    assert table + 24 * samples == len(blob)
    images = []
    for i in range(samples):
        (pointer,) = struct.unpack_from("<Q", blob, 24 + 2 * 1041 + 24 * i + 5)
        images.append(blob[pointer : pointer + sizes[pointer]])
    return images


def test_raw_images_are_stored_as_they_are_and_described(tmp_path):
    spec, source = spec_of(tmp_path, write_mode="raw"), Pictures(130)
    path = tmp_path / "x.beton"
    beton.write(source, path, spec, workers=1)
    assert stored(path) == [image.tobytes() for image in source.images]
    assert beton.labels(path).dtype == np.int64
    assert beton.labels(path).tolist() == source.labels.tolist()
    sidecar = json.loads(beton.sidecar_of(path).read_text())
    assert sidecar["samples"] == 130
    assert sidecar["classes"] == CLASS_NAMES
    assert sidecar["histogram"] == [44, 43, 43]
    assert sidecar["source"] == "pictures"
    assert sidecar["bytes"] == path.stat().st_size
    assert sidecar["writer"]["mode"] == "raw"
    checked = beton.check(path, spec, "train", verify=True)
    assert checked["digest"] == checked["sha256"] == sidecar["sha256"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["set", "x.beton", "x.json"]


@pytest.mark.parametrize("mode", ["raw", "jpg", "proportion"])
def test_bytes_do_not_depend_on_the_number_of_workers(tmp_path, mode):
    spec, source = spec_of(tmp_path, write_mode=mode), Pictures(150)
    for workers in (1, 2):
        beton.write(source, tmp_path / f"{workers}.beton", spec, workers)
    assert (tmp_path / "1.beton").read_bytes() == (tmp_path / "2.beton").read_bytes()


def test_proportion_mode_stores_about_that_share_as_jpeg_and_repeats_itself(tmp_path):
    source = Pictures(400, sizes=(16,))
    spec = spec_of(tmp_path, write_mode="proportion", compress_probability=0.3)
    shares = []
    for name in ("a", "b"):
        path = tmp_path / f"{name}.beton"
        beton.write(source, path, spec, 1)
        shares.append([image[:2] == b"\xff\xd8" for image in stored(path)])
    assert shares[0] == shares[1]
    assert 0.2 < np.mean(shares[0]) < 0.4
    raw = [i for i, jpeg in enumerate(shares[0]) if not jpeg]
    assert [stored(tmp_path / "a.beton")[i] for i in raw] == [source.images[i].tobytes() for i in raw]


def test_long_images_are_shrunk_and_never_vanish(tmp_path):
    source = Pictures(3, sizes=(16,))
    source.images = [np.full((200, 100, 3), 9, np.uint8), np.full((1, 500, 3), 7, np.uint8), source.images[2]]
    spec = spec_of(tmp_path, write_mode="raw", max_resolution=50)
    beton.write(source, tmp_path / "x.beton", spec, 1)
    header = beton_format.read_header(tmp_path / "x.beton")
    images = beton_format.read_metadata(header)["image"]
    assert list(zip(images["height"].tolist(), images["width"].tolist(), strict=True)) == [(50, 25), (1, 50), (16, 16)]
    assert stored(tmp_path / "x.beton")[0] == b"\x09" * (50 * 25 * 3)


def test_images_that_do_not_fit_one_page_go_to_the_next(tmp_path):
    spec = spec_of(tmp_path, write_mode="raw", max_resolution=500)
    source = Pictures(6, sizes=(500,))
    beton.write(source, tmp_path / "x.beton", spec, 1)
    header = beton_format.read_header(tmp_path / "x.beton")
    table = beton_format.image_table(header, beton_format.read_metadata(header))
    assert header.page_size == 1 << 21
    pages = table[:, 0] // header.page_size
    assert (pages == (table[:, 0] + table[:, 1] - 1) // header.page_size).all()
    assert len(set(pages.tolist())) == 3
    assert stored(tmp_path / "x.beton") == [image.tobytes() for image in source.images]


@pytest.mark.parametrize("workers", [1, 2])
def test_an_unreadable_image_is_named_and_leaves_nothing(tmp_path, workers):
    spec = spec_of(tmp_path)
    for error, words in (
        (OSError("broken data stream"), "image 100 .*broken data stream"),
        (UserError("bee/7.jpg"), "bee/7"),
    ):
        with pytest.raises(UserError, match=words):
            beton.write(Pictures(bad={100: raiser(error)}), tmp_path / "b" / "x.beton", spec, workers)
        assert list((tmp_path / "b").iterdir()) == []


def test_a_killed_worker_is_an_error_not_a_hang(tmp_path):
    source = Pictures(bad={70: lambda: os.kill(os.getpid(), signal.SIGKILL)})
    with pytest.raises(UserError, match="was killed"):
        beton.write(source, tmp_path / "b" / "x.beton", spec_of(tmp_path), 2)
    assert list((tmp_path / "b").iterdir()) == []


def test_an_interrupted_writing_keeps_the_old_file(tmp_path):
    spec, path = spec_of(tmp_path), tmp_path / "b" / "x.beton"
    beton.write(Pictures(), path, spec, 1)
    before = path.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        beton.write(Pictures(seed=1, bad={150: raiser(KeyboardInterrupt())}), path, spec, 1)
    assert path.read_bytes() == before
    assert beton.check(path, spec, "train", verify=True)["samples"] == 200
    assert sorted(p.name for p in path.parent.iterdir()) == ["x.beton", "x.json"]


def test_an_older_sidecar_never_stands_beside_a_newer_file(tmp_path, monkeypatch):
    spec, path = spec_of(tmp_path), tmp_path / "b" / "x.beton"
    beton.write(Pictures(), path, spec, 1)
    monkeypatch.setattr(beton.atomic, "write_json", raiser(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        beton.write(Pictures(100), path, spec, 1)
    assert len(beton.labels(path)) == 100
    assert not beton.sidecar_of(path).exists()


def test_names_depend_on_what_changes_the_bytes_and_on_nothing_else(tmp_path):
    def name(split: str = "train", **data: object) -> str:
        return beton.path_of(spec_of(tmp_path, **data), split).name

    raw, jpg, mixed = ({"write_mode": mode} for mode in ("raw", "jpg", "proportion"))
    assert name(**raw).startswith("folder-train-")
    assert len(name(**raw)) == len("folder-train-01234567.beton")
    assert len({name(**raw), name("test", **raw), name(**jpg), name(**mixed), name(**raw, max_resolution=70)}) == 5
    assert name(**raw) == name(**raw, jpeg_quality=50) == name(**raw, compress_probability=0.9) == name(**raw, pad=2)
    assert name(**jpg) != name(**jpg, jpeg_quality=50)
    assert name(**jpg) == name(**jpg, compress_probability=0.9)
    assert name(**mixed) != name(**mixed, compress_probability=0.9)
