"""The FFCV loader: order and pixels. Small files, few loaders; all in one process."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
import torch

pytestmark = [pytest.mark.ffcv, pytest.mark.xdist_group("ffcv")]

pytest.importorskip("ffcv", reason="FFCV is not installed")

from tests.data import ffcv_cases  # noqa: E402
from tests.data.ffcv_cases import CPU, MEAN, SAMPLES, STD, Pictures, load, read, same, spec_of  # noqa: E402
from utils.data import beton, ffcv_loader, stateless  # noqa: E402
from utils.data.device_loader import DeviceLoader  # noqa: E402
from utils.data.order import Shard, epoch_order  # noqa: E402


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return ffcv_cases.write_files(tmp_path_factory.mktemp("betons"))


def indices_in(batches) -> list[list[int]]:
    """Of `numbered` images, whose every pixel is their index."""
    return [images[:, 0, 0, 0].int().tolist() for images, _ in batches]


@pytest.mark.parametrize(("ranks", "accumulation"), [(1, 1), (2, 1), (3, 2)])
def test_training_order_is_the_epochs_permutation_cut_over_ranks(files, ranks, accumulation):
    chosen = np.arange(0, SAMPLES, 2)[::-1].copy()
    size, micro = 24, 24 // (ranks * accumulation)
    for level, epoch in ((0, 0), (2, 5)):
        order = chosen[epoch_order(5, level, epoch, len(chosen))]
        for rank in range(ranks):
            loader = load(files, "numbered", spec_of(plain=True), chosen, Shard(rank, ranks, size, accumulation))
            wanted = []
            for step in range(len(chosen) // size):
                for part in range(accumulation):
                    at = step * size + part * ranks * micro + rank * micro
                    wanted.append(order[at : at + micro].tolist())
            batches = read(loader, level, epoch)
            assert indices_in(batches) == wanted
            assert [labels.tolist() for _, labels in batches] == [[i % 7 for i in batch] for batch in wanted]
            assert len(loader) == len(wanted)
            assert loader.samples == len(chosen) // size * size


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("count", [SAMPLES, 2])
def test_evaluation_sees_every_sample_once(files, ranks, count):
    chosen = np.arange(count)[::-1].copy()
    seen = []
    for rank in range(ranks):
        loader = load(files, "numbered", spec_of(plain=True), chosen, Shard(rank, ranks, 6), training=False)
        first = indices_in(read(loader))
        assert all(len(batch) == 16 for batch in first[:-1])
        assert len(loader) == len(first)
        assert loader.samples == count
        assert first == indices_in(read(loader, 3, 4))
        mine = [index for batch in first for index in batch]
        assert mine == chosen[rank::ranks].tolist()
        seen += mine
    assert sorted(seen) == list(range(count))


def test_pixels_are_the_same_for_any_workers_ranks_and_run(files, monkeypatch):
    monkeypatch.setattr(ffcv_loader, "allowed_cpus", lambda: 2)
    spec = spec_of(cutout=5)
    one = load(files, "square", spec)
    first = read(one, 1, 2)
    assert same(first, read(one, 1, 2))
    two = load(files, "square", spec, workers=2)
    assert (one.workers, two.workers) == (1, 2)
    assert same(first, read(two, 1, 2))
    odd = [read(load(files, "square", spec, shard=Shard(0, 1, 19), workers=workers)) for workers in (1, 2)]
    assert same(*odd)
    halves = [read(load(files, "square", spec, shard=Shard(rank, 2, 20)), 1, 2) for rank in range(2)]
    joined = [(torch.cat([a, c]), torch.cat([b, d])) for (a, b), (c, d) in zip(halves[0], halves[1], strict=True)]
    assert same(first, joined)


def test_pixels_differ_by_seed_level_and_epoch_and_not_by_order(files):
    """Compared per sample, as the order differs too."""

    def by_sample(level: int, epoch: int, seed: int) -> dict[int, torch.Tensor]:
        loader = load(files, "square", spec_of(), shard=Shard(0, 1, SAMPLES), order_seed=seed)
        ((images, _),) = read(loader, level, epoch)
        return dict(zip(epoch_order(seed, level, epoch, SAMPLES).tolist(), images, strict=True))

    base = by_sample(0, 0, 5)
    for other in (by_sample(1, 0, 5), by_sample(0, 1, 5), by_sample(0, 0, 6)):
        equal = sum(torch.equal(base[i], other[i]) for i in range(SAMPLES))
        assert equal < 0.1 * SAMPLES  # 1 in 98 by chance


def draw(key: int, index: int, stream: int) -> float:
    return float(stateless.uniform(key, np.array([index]), stream)[0])


def cropped(image: np.ndarray, key: int, index: int, pad: int) -> np.ndarray:
    """A padded crop and a mirror, one pixel at a time."""
    size = image.shape[0]
    y0 = int(draw(key, index, stateless.CROP_Y) * (2 * pad + 1)) - pad
    x0 = int(draw(key, index, stateless.CROP_X) * (2 * pad + 1)) - pad
    out = np.zeros_like(image)
    for y in range(size):
        for x in range(size):
            if 0 <= y + y0 < size and 0 <= x + x0 < size:
                out[y, x] = image[y + y0, x + x0]
    return out[:, ::-1] if draw(key, index, stateless.FLIP) < 0.5 else out


def normalised(image: np.ndarray) -> np.ndarray:
    return ((image.astype(np.float32) - np.float32(MEAN)) / np.float32(STD)).transpose(2, 0, 1)


@pytest.mark.parametrize("cutout", [0, 5])
def test_crop_flip_and_cutout_are_bit_for_bit_what_a_plain_loop_makes(files, cutout):
    spec, key = spec_of(cutout=cutout), stateless.epoch_key(5, 2, 3)
    order = epoch_order(5, 2, 3, SAMPLES)
    batches = read(load(files, "square", spec), 2, 3)
    assert len(batches) == SAMPLES // 20
    touched = 0
    for step, (images, _) in enumerate(batches):
        for place, got in enumerate(images.numpy()):
            index = int(order[20 * step + place])
            wanted = normalised(cropped(files["square"][1].images[index], key, index, 3)).copy()
            if cutout:
                y = int(draw(key, index, stateless.CUTOUT_Y) * 16) - cutout // 2
                x = int(draw(key, index, stateless.CUTOUT_X) * 16) - cutout // 2
                wanted[:, max(0, y) : y + cutout, max(0, x) : x + cutout] = 0
                touched += y < 0 or x < 0
            np.testing.assert_array_equal(got, wanted)
    assert touched or not cutout


def test_the_device_loader_makes_the_same_batches_of_small_raw_images(files):
    spec = spec_of(cutout=5)
    source = files["square"][1]
    options = {"training": True, "order_seed": 5, "channels_last": True, "workers": 1}
    other = DeviceLoader(spec, source, np.arange(SAMPLES), Shard(0, 1, 20), CPU, eval_batch=16, **options)
    assert same(read(load(files, "square", spec, channels_last=True), 1, 1), read(other, 1, 1))


def box_of(key: int, index: int, height: int, width: int) -> tuple[int, int, int, int]:
    """A random resized crop, one image at a time."""
    for attempt in range(10):
        area = height * width * (0.08 + 0.92 * draw(key, index, stateless.RRC_AREA + 16 * attempt))
        low, high = math.log(3 / 4), math.log(4 / 3)
        ratio = math.exp(low + (high - low) * draw(key, index, stateless.RRC_RATIO + 16 * attempt))
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < h <= height and 0 < w <= width:
            y = int(draw(key, index, stateless.RRC_Y) * (height - h + 1))
            x = int(draw(key, index, stateless.RRC_X) * (width - w + 1))
            return y, x, h, w
    h, w = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


def resized(image: np.ndarray, box: tuple[int, int, int, int], size: int) -> np.ndarray:
    y, x, h, w = box
    part = np.ascontiguousarray(image[y : y + h, x : x + w])
    return part if (h, w) == (size, size) else cv2.resize(part, (size, size), interpolation=cv2.INTER_AREA)


@pytest.mark.parametrize("size", [None, 32])
def test_random_resized_crops_of_images_of_any_size(files, size):
    spec = spec_of(augment="rrc")
    key, order = stateless.epoch_key(5, 0, 1), epoch_order(5, 0, 1, 60)
    batches = read(load(files, "mixed", spec), 0, 1, size=size)
    assert len(batches) == 3
    for step, (images, _) in enumerate(batches):
        assert images.shape == (20, 3, size or 16, size or 16)
        for place, got in enumerate(images.numpy()):
            index = int(order[20 * step + place])
            image = files["mixed"][1].images[index]
            wanted = resized(image, box_of(key, index, *image.shape[:2]), size or 16)
            if draw(key, index, stateless.FLIP) < 0.5:
                wanted = wanted[:, ::-1]
            # OpenCV's versions may round a pixel differently.
            np.testing.assert_allclose(got, normalised(wanted), atol=1.01 / min(STD), rtol=0)


@pytest.mark.parametrize(("ratio", "size"), [(1.0, 16), (0.875, 24)])
def test_evaluation_takes_the_centre_square(files, ratio, size):
    loader = load(files, "mixed", spec_of(eval_ratio=ratio, eval_size=size), training=False)
    images = torch.cat([images for images, _ in loader]).numpy()
    for got, image in zip(images, files["mixed"][1].images, strict=True):
        height, width = image.shape[:2]
        side = int(ratio * min(height, width))
        wanted = resized(image, ((height - side) // 2, (width - side) // 2, side, side), size)
        np.testing.assert_allclose(got, normalised(wanted), atol=1.01 / min(STD), rtol=0)


@pytest.mark.parametrize("size", [None, 8])
def test_padded_crops_of_images_of_any_size_are_made_of_their_centre_square(files, size):
    key, order = stateless.epoch_key(5, 0, 0), epoch_order(5, 0, 0, 60)
    ((images, _),) = read(load(files, "mixed", spec_of(), shard=Shard(0, 1, 60)), size=size)
    for place, got in enumerate(images.numpy()):
        index = int(order[place])
        image = files["mixed"][1].images[index]
        height, width = image.shape[:2]
        side = min(height, width)
        square = resized(image, ((height - side) // 2, (width - side) // 2, side, side), 16)
        wanted = cropped(square, key, index, 3)
        if size:
            wanted = resized(np.ascontiguousarray(wanted), (0, 0, 16, 16), size)
        np.testing.assert_allclose(got, normalised(wanted), atol=2.01 / min(STD), rtol=0)


def test_jpeg_images_are_close_to_their_originals(files):
    options = {"training": False, "eval_batch": 60}
    ((jpeg, _),) = load(files, "jpeg", spec_of(plain=True), **options)
    ((raw, _),) = load(files, "mixed", spec_of(plain=True), **options)
    difference = (jpeg - raw).abs()
    assert 0 < difference.mean() < 3
    swapped = (jpeg.flip(1) - raw).abs().mean()
    assert swapped > 5 * difference.mean()


def test_formats_and_types(files):
    for channels_last in (False, True):
        images, labels = read(load(files, "square", spec_of(), channels_last=channels_last))[0]
        assert images.dtype == torch.float32
        assert labels.dtype == torch.int64
        assert labels.shape == (20,)
        assert images.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def test_start_batch_continues_where_an_epoch_was_left(files):
    loader = load(files, "square", spec_of(cutout=5))
    whole = read(loader, 1, 4)
    for start in (0, 3, len(whole) - 1, len(whole)):
        assert same(read(loader, 1, 4, start), whole[start:])
        assert loader.start_batch == 0
    assert same(list(loader), whole)
    with pytest.raises(ValueError, match="outside"):
        loader.set_epoch(0, 0, len(whole) + 1)


def test_the_page_cache_of_the_process_gives_the_same_batches(files, tmp_path):
    rng = np.random.default_rng(1)
    source = Pictures([rng.integers(0, 256, (250, 250, 3), dtype=np.uint8) for _ in range(40)], np.arange(40) % 7)
    beton.write(source, tmp_path / "pages.beton", spec_of(), 1)
    files = {**files, "pages": (tmp_path / "pages.beton", source)}
    for name in ("square", "jpeg", "pages"):
        spec, cached = (spec_of(augment="rrc", os_cache=mapped) for mapped in (True, False))
        assert same(read(load(files, name, spec), 0, 1), read(load(files, name, cached), 0, 1))
