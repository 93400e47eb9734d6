"""data.resize: FFCV's pixels by the native library and without it, the other filters, and what is said where."""

from __future__ import annotations

import dataclasses
import logging

import cv2
import numpy as np
import pytest
import torch

pytestmark = [pytest.mark.ffcv, pytest.mark.xdist_group("ffcv")]

pytest.importorskip("ffcv", reason="FFCV is not installed")

from tests.data import ffcv_cases  # noqa: E402
from tests.data.ffcv_cases import Pictures, load, read, run, same, spec_of  # noqa: E402
from tests.native_library import need_decoder  # noqa: E402
from utils import data, native, params  # noqa: E402
from utils.data import augment, beton, ffcv_loader, ffcv_native, stateless  # noqa: E402
from utils.data.ffcv_import import ctypes_imdecode, ctypes_resize  # noqa: E402
from utils.data.ffcv_native import AREA, BILINEAR, FFCV_RESIZE, PART, SCALED, WHOLE  # noqa: E402
from utils.data.order import Shard, epoch_order  # noqa: E402
from utils.system.errors import UserError  # noqa: E402

SIZES = ((75, 100), (120, 64), (64, 64), (200, 140), (33, 47))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Images with detail, larger and smaller than what is made of them, as JPEG and raw."""
    folder, rng = tmp_path_factory.mktemp("native"), np.random.default_rng(2)
    images = []
    for number in range(40):
        shape = ffcv_cases.smooth(rng, *SIZES[number % len(SIZES)])
        images.append(np.clip(shape + rng.normal(0, 12, shape.shape), 0, 255).astype(np.uint8))
    source = Pictures(images, np.arange(40) % 7)
    for name, mode in (("jpg", "jpg"), ("raw", "raw")):
        beton.write(source, folder / f"{name}.beton", spec_of(mode), 1)
    return {name: (folder / f"{name}.beton", source) for name in ("jpg", "raw")}


@pytest.fixture
def _native():
    need_decoder()


def missing():
    raise native.Missing("it is not built")


MODES = {
    "rrc": ({"augment": "rrc", "image_size": 48}, {}),
    "rrc, shrunk": ({"augment": "rrc", "image_size": 48}, {"size": 32}),
    "padded crop": ({"augment": "crop", "image_size": 40}, {}),
    "padded crop, shrunk": ({"augment": "crop", "image_size": 40}, {"size": 24}),
    "none": ({"augment": "none", "image_size": 33}, {}),
    "evaluation": ({"eval_ratio": 0.875, "eval_size": 56}, {"training": False}),
}


@pytest.mark.usefixtures("_native")
@pytest.mark.parametrize("name", ["jpg", "raw"])
@pytest.mark.parametrize("mode", MODES)
def test_ffcvs_pixels_to_the_bit_with_and_without_the_library(files, monkeypatch, name, mode):
    changes, how = MODES[mode]
    training, size = how.get("training", True), how.get("size")
    loader = load(files, name, spec_of(**changes), training=training)
    assert loader._ways == (PART, AREA)
    fast = read(loader, 1, 2, size=size)
    monkeypatch.setattr(ffcv_native.native, "load", missing)
    loader = load(files, name, spec_of(**changes), training=training)
    assert loader._ways == (WHOLE, FFCV_RESIZE)
    assert same(fast, read(loader, 1, 2, size=size))


@pytest.mark.usefixtures("_native")
def test_the_pixels_are_those_of_ffcvs_functions(files):
    """FFCV's decoder and resize called by hand, on boxes drawn by hand."""
    spec = dataclasses.replace(spec_of(augment="rrc", image_size=48), mean=(0.0,) * 3, std=(1.0,) * 3)
    loader = load(files, "jpg", spec)
    loader.set_epoch(0, 1)
    key, order = stateless.epoch_key(5, 0, 1), epoch_order(5, 0, 1, 40)
    got = torch.cat([images for images, _ in loader]).permute(0, 2, 3, 1).numpy()
    assert len(got) == 40
    images = files["jpg"][1].images
    for sample, made in zip(order, got, strict=True):
        height, width = images[sample].shape[:2]
        bgr = cv2.cvtColor(images[sample], cv2.COLOR_RGB2BGR)
        jpeg = cv2.imencode(".jpg", bgr, [int(cv2.IMWRITE_JPEG_QUALITY), 90])[1].reshape(-1)
        whole, wanted = np.empty((height, width, 3), np.uint8), np.empty((48, 48, 3), np.uint8)
        size = (height, width, 0, 0, 1, 1, False, False)
        assert ctypes_imdecode(jpeg.ctypes.data, jpeg.size, height, width, whole.ctypes.data, *size) == 0
        one = np.array([sample])
        ((y, x, h, w),) = augment.rrc_boxes(key, one, np.array([height]), np.array([width])).tolist()
        ctypes_resize(0, whole.ctypes.data, height, width, y, y + h, x, x + w, wanted.ctypes.data, 48, 48)
        assert np.array_equal(made, wanted[:, ::-1] if augment.flips(key, one)[0] else wanted)


def spec_with(resize: str, **changes: object):
    spec = spec_of(**changes)
    return dataclasses.replace(spec, data=dataclasses.replace(spec.data, resize=resize))


@pytest.mark.usefixtures("_native")
@pytest.mark.parametrize("resize", ["ffcv", "area", "bilinear"])
def test_pixels_depend_on_no_number_of_threads(files, monkeypatch, resize):
    monkeypatch.setattr(ffcv_loader, "allowed_cpus", lambda: 3)
    spec = spec_with(resize, augment="rrc", image_size=24)
    one, two, three = (read(load(files, "jpg", spec, workers=n, shard=Shard(0, 1, 13)), 0, 3) for n in (1, 2, 3))
    assert same(one, two)
    assert same(one, three)
    assert not same(one, read(load(files, "jpg", spec, shard=Shard(0, 1, 13)), 0, 4))


@pytest.mark.usefixtures("_native")
@pytest.mark.parametrize(("resize", "ways"), [("area", (SCALED, AREA)), ("bilinear", (SCALED, BILINEAR))])
def test_other_filters_give_other_pixels_and_the_same_picture(files, resize, ways):
    changes = {"augment": "rrc", "image_size": 24}
    (plain, labels), *_ = read(load(files, "jpg", spec_of(**changes)))
    loader = load(files, "jpg", spec_with(resize, **changes))
    assert loader._ways == ways
    (other, same_labels), *_ = read(loader)
    assert torch.equal(labels, same_labels)
    difference = (plain - other).abs().mean()
    assert 0 < difference < 0.35  # standard deviations
    assert (plain - other.flip(3)).abs().mean() > 1.3 * difference


@pytest.mark.usefixtures("_native")
def test_large_boxes_are_scaled_while_decoding(files):
    """Evaluation at 24 pixels: centre squares of 64 and more are decoded at half the size, of 140 at a quarter."""
    loader = load(files, "jpg", spec_with("area", eval_size=24, plain=True), training=False, eval_batch=40)
    ((images, _),) = list(loader)
    for made, image in zip(images.permute(0, 2, 3, 1).numpy(), files["jpg"][1].images, strict=True):
        height, width = image.shape[:2]
        side = min(height, width)
        y, x = (height - side) // 2, (width - side) // 2
        scale = 4 if side >= 96 else 2 if side >= 48 else 1
        bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
        flag = {1: 1, 2: cv2.IMREAD_REDUCED_COLOR_2, 4: cv2.IMREAD_REDUCED_COLOR_4}[scale]
        jpeg = cv2.imencode(".jpg", bgr, [int(cv2.IMWRITE_JPEG_QUALITY), 90])[1]
        small = cv2.cvtColor(cv2.imdecode(jpeg, flag), cv2.COLOR_BGR2RGB)
        first, last = ([(place + scale // 2) // scale for place in at] for at in ((y, x), (y + side, x + side)))
        part = np.ascontiguousarray(small[first[0] : last[0], first[1] : last[1]])
        wanted = cv2.resize(part, (24, 24), interpolation=cv2.INTER_AREA)
        assert np.abs(made - wanted).max() <= 1  # OpenCV's versions may round a pixel differently


def test_without_the_library_ffcv_decodes_and_one_line_says_so(monkeypatch, caplog):
    monkeypatch.setattr(ffcv_native.native, "load", missing)
    with caplog.at_level(logging.WARNING):
        ffcv_native.tell("ffcv")
    (record,) = caplog.records
    assert "not built" in record.message
    assert "make setup" in record.message
    for resize in ("area", "bilinear"):
        with pytest.raises(UserError, match=rf"data\.resize={resize}: .* not built; run make setup"):
            ffcv_native.tell(resize)


@pytest.mark.usefixtures("_native")
def test_with_the_library_nothing_is_said(caplog):
    with caplog.at_level(logging.DEBUG):
        ffcv_native.tell("ffcv")
        ffcv_native.tell("bilinear")
    assert not caplog.records


@pytest.mark.usefixtures("_native")
@pytest.mark.parametrize(("function", "ways"), [("decode", (WHOLE, AREA)), ("resize", (PART, FFCV_RESIZE))])
def test_other_bits_than_ffcvs_are_noticed_and_not_used(monkeypatch, caplog, function, ways):
    """As on a machine whose FFCV was built with another libjpeg-turbo or OpenCV."""
    honest = getattr(native, function)
    monkeypatch.setattr(ffcv_native.native, function, lambda *given: honest(*given) ^ 1)
    ffcv_native._like_ffcv.cache_clear()
    try:
        assert ffcv_native.ways("ffcv") == ways
        with caplog.at_level(logging.WARNING):
            ffcv_native.tell("ffcv")
        (record,) = caplog.records
        assert "same pixels" in record.message
    finally:
        ffcv_native._like_ffcv.cache_clear()


@pytest.mark.usefixtures("_native")
def test_a_process_without_the_library_reads_the_same_pixels(files, tmp_path):
    """The kernel is compiled for a process that has no such functions at all."""
    path = files["jpg"][0]
    spec = spec_of(augment="rrc", image_size=48)
    images = torch.cat([images for images, _ in read(load(files, "jpg", spec), 0, 1)])
    done = run(f"""
        import numpy as np, torch
        from pathlib import Path
        from utils import native
        native.LIBRARY = Path("gone.so")
        from tests.data.ffcv_cases import Pictures, load, read, spec_of
        source = Pictures([None] * 40, np.arange(40) % 7)
        batches = read(load({{"x": (Path({str(path)!r}), source)}}, "x", spec_of(augment="rrc", image_size=48)), 0, 1)
        np.save({str(tmp_path / "read.npy")!r}, torch.cat([images for images, _ in batches]).numpy())
    """)
    assert done.returncode == 0, done.stderr
    assert np.array_equal(np.load(tmp_path / "read.npy"), images.numpy())


@pytest.mark.usefixtures("_native")
@pytest.mark.parametrize("resize", ["ffcv", "bilinear"])
def test_damage_names_the_image(files, tmp_path, resize):
    path, source = files["jpg"]
    blob, at = bytearray(path.read_bytes()), -1
    for _ in range(4):  # the fourth image
        at = blob.index(b"\xff\xd8\xff", at + 1)
    blob[at + 900 : at + 960] = b"\xff\xd9" * 30
    (tmp_path / "spoilt.beton").write_bytes(blob)
    loader = load({"x": (tmp_path / "spoilt.beton", source)}, "x", spec_with(resize), training=False, eval_batch=2)
    batches = iter(loader)
    next(batches)
    with pytest.raises(UserError, match=r"spoilt\.beton: image 3 is damaged"):
        next(batches)


@pytest.mark.parametrize(("rank", "lines"), [(0, 1), (1, 0)])
def test_building_loaders_tells_once_and_refuses_before_anything_is_made(monkeypatch, caplog, tmp_path, rank, lines):
    monkeypatch.setattr(ffcv_native.native, "load", missing)

    def config(resize: str) -> params.Params:
        section = params.Data(name="digits", root=str(tmp_path), resize=resize)
        return params.Params(data=section, training=params.Training(batch_size=100))

    with pytest.raises(UserError, match=r"data\.resize=area: "):
        data.prepare(config("area"))
    assert not list(tmp_path.iterdir())
    wanted = config("ffcv")
    data.prepare(wanted)
    with caplog.at_level(logging.WARNING):
        loaders = data.build(wanted, Shard(rank, 2, 100), ffcv_cases.CPU, channels_last=False, workers=1)
    try:
        images, _ = next(iter(loaders.train))
        assert images.shape[0] == 50
    finally:
        loaders.close()
    assert len([record for record in caplog.records if "native decoder" in record.message]) == lines
