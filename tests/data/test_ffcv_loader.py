"""The FFCV loader: order, pixels, ends of threads, errors. Small files, few loaders; all in one process."""

from __future__ import annotations

import gc
import math
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import cv2
import numba
import numpy as np
import pytest
import torch
from PIL import Image

pytestmark = [pytest.mark.ffcv, pytest.mark.xdist_group("ffcv")]

pytest.importorskip("ffcv", reason="FFCV is not installed")

from utils import params  # noqa: E402
from utils.data import allowed_cpus, beton, ffcv_epoch, ffcv_loader, stateless  # noqa: E402
from utils.data.device_loader import DeviceLoader  # noqa: E402
from utils.data.order import Shard, epoch_order  # noqa: E402
from utils.data.spec import DataSpec  # noqa: E402
from utils.system.errors import UserError  # noqa: E402

CPU = torch.device("cpu")
SAMPLES = 203
MEAN, STD = (120.5, 99.25, 131.0), (61.5, 70.25, 58.75)


class Pictures:
    def __init__(self, images: list[np.ndarray], labels: np.ndarray) -> None:
        self.images, self.labels, self.classes = images, labels, [str(label) for label in range(7)]

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> Image.Image:
        return Image.fromarray(self.images[index])

    def digest(self) -> str:
        return "pictures"


def spec_of(mode: str = "raw", plain: bool = False, **options: object) -> DataSpec:
    """`plain`: pixels come out as they are stored."""
    data = {key: options.pop(key) for key in ("pad", "cutout", "os_cache") if key in options}
    settled = {"image_size": 16, "eval_size": 16, "augment": "crop", "flip": True, "eval_ratio": 1.0, **options}
    if plain:
        settled |= {"augment": "none", "flip": False}
    return DataSpec(
        name="folder",
        directory=Path("/nowhere"),
        betons=Path("/nowhere"),
        classes=7,
        max_resolution=400,
        write_mode=mode,
        mean=(0.0, 0.0, 0.0) if plain else MEAN,
        std=(1.0, 1.0, 1.0) if plain else STD,
        data=params.Data(name="folder", **{"pad": 3, **data}),
        **settled,
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """.beton files and what they hold: square (16 px), numbered (pixel = index), mixed sizes raw and as JPEG."""
    folder = tmp_path_factory.mktemp("betons")
    rng = np.random.default_rng(0)
    square = [rng.integers(0, 256, (16, 16, 3), dtype=np.uint8) for _ in range(SAMPLES)]
    numbered = [np.full((16, 16, 3), i, np.uint8) for i in range(SAMPLES)]
    sizes = [(40, 30), (16, 16), (24, 64), (90, 20), (16, 20)]
    mixed = [smooth(rng, *sizes[i % len(sizes)]) for i in range(60)]
    found = {}
    for name, images, mode in (
        ("square", square, "raw"),
        ("numbered", numbered, "raw"),
        ("mixed", mixed, "raw"),
        ("jpeg", mixed, "jpg"),
    ):
        source = Pictures(images, np.arange(len(images)) % 7)
        found[name] = (folder / f"{name}.beton", source)
        beton.write(source, found[name][0], spec_of(mode), 1)
    return found


def smooth(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A picture JPEG keeps well."""
    coarse = rng.integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def load(files, name: str, spec: DataSpec, indices: np.ndarray | None = None, shard: Shard | None = None, **options):
    path, source = files[name]
    options = {
        "training": True,
        "order_seed": 5,
        "channels_last": False,
        "workers": 1,
        "eval_batch_size": 16,
        **options,
    }
    indices = np.arange(len(source)) if indices is None else indices
    return ffcv_loader.make(spec, path, indices, shard or Shard(0, 1, 20, 1), CPU, **options)


def read(loader, level: int = 0, epoch: int = 0, start: int = 0, size: int | None = None):
    loader.set_epoch(level, epoch, start, size)
    return list(loader)


def same(left, right) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(left, right, strict=True)
    )


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
    options = {"training": False, "eval_batch_size": 60}
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


def own_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread is not threading.main_thread() and thread.is_alive()]


@pytest.mark.parametrize("os_cache", [True, False])
def test_a_partial_read_leaves_no_thread(files, os_cache):
    before = own_threads()
    loader = load(files, "square", spec_of(os_cache=os_cache))
    for _ in range(3):
        for _, _ in loader:
            break
    assert own_threads() == before
    open_one = iter(loader)
    next(open_one)
    other = iter(loader)
    next(other)
    assert len(own_threads()) > len(before)
    loader.close()
    assert own_threads() == before
    loader.close()
    assert len(read(loader)) == len(loader)
    never_started = iter(loader)
    del open_one, other, never_started
    gc.collect()
    assert own_threads() == before


def test_a_partial_read_ends_with_the_batch_in_hand(files, monkeypatch):
    loader, original, calls = load(files, "square", spec_of()), ffcv_loader.augment.crop_offsets, []

    def slowly(*arguments):
        calls.append(arguments)
        if len(calls) > 1:
            time.sleep(0.5)
        return original(*arguments)

    monkeypatch.setattr(ffcv_loader.augment, "crop_offsets", slowly)
    for _, _ in loader:
        break
    assert len(calls) <= 3


def test_reading_on_after_close_is_an_error(files):
    loader = load(files, "square", spec_of())
    batches = iter(loader)
    next(batches)
    loader.close()
    with pytest.raises(RuntimeError, match="was closed"):
        next(batches)


def test_held_batches_keep_their_pixels_and_labels(files):
    loader = load(files, "square", spec_of(), shard=Shard(0, 1, 5))
    loader.set_epoch(0, 0)
    held, copies = [], []
    for images, labels in loader:
        held.append((images, labels))
        copies.append((images.clone(), labels.clone()))
    assert len(held) == 40
    assert same(held, copies)
    for images, labels in held:
        images.zero_()
        labels.zero_()
    assert same(read(loader), copies)


def test_the_page_cache_of_the_process_gives_the_same_batches(files, tmp_path):
    rng = np.random.default_rng(1)
    source = Pictures([rng.integers(0, 256, (250, 250, 3), dtype=np.uint8) for _ in range(40)], np.arange(40) % 7)
    beton.write(source, tmp_path / "pages.beton", spec_of(), 1)
    files = {**files, "pages": (tmp_path / "pages.beton", source)}
    for name in ("square", "jpeg", "pages"):
        spec, cached = (spec_of(augment="rrc", os_cache=mapped) for mapped in (True, False))
        assert same(read(load(files, name, spec), 0, 1), read(load(files, name, cached), 0, 1))


def test_an_error_in_the_pipeline_reaches_the_reader(files, monkeypatch):
    loader = load(files, "square", spec_of())
    original, calls = ffcv_loader.augment.crop_offsets, []

    def break_down(*arguments):
        calls.append(arguments)
        if len(calls) == 4:
            raise ArithmeticError("no offsets today")
        return original(*arguments)

    monkeypatch.setattr(ffcv_loader.augment, "crop_offsets", break_down)
    before, started, got = own_threads(), time.monotonic(), []
    with pytest.raises(ArithmeticError, match="no offsets today"):
        got.extend(loader)
    assert len(got) == 3
    assert time.monotonic() - started < 30
    assert own_threads() == before
    monkeypatch.undo()
    assert len(read(loader)) == len(loader)


def test_a_thread_that_dies_in_silence_is_an_error(files, monkeypatch):
    monkeypatch.setattr(ffcv_epoch.EpochReader, "_run", lambda self: None)
    monkeypatch.setattr(ffcv_epoch, "POLL_SECONDS", 0.05)
    with pytest.raises(RuntimeError, match="ended without a word"):
        next(iter(load(files, "square", spec_of())))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_page_readers_that_die_are_an_error(files, tmp_path, monkeypatch):
    monkeypatch.setattr(ffcv_epoch, "POLL_SECONDS", 0.05)
    path = tmp_path / "gone.beton"
    path.write_bytes(files["square"][0].read_bytes())
    loader = load({"gone": (path, files["square"][1])}, "gone", spec_of(os_cache=False))
    path.unlink()
    before = own_threads()
    with pytest.raises(RuntimeError, match="page reader died"):
        next(iter(loader))
    assert own_threads() == before


def test_a_damaged_image_is_named(files, tmp_path):
    path, source = files["jpeg"]
    spoilt = tmp_path / "spoilt.beton"
    blob = bytearray(path.read_bytes())
    at = blob.index(b"\xff\xd8", blob.index(b"\xff\xd8", blob.index(b"\xff\xd8") + 1) + 1)  # the third image
    blob[at : at + 300] = bytes(300)
    spoilt.write_bytes(blob)
    loader = load({"spoilt": (spoilt, source)}, "spoilt", spec_of(), training=False, eval_batch_size=2)
    batches = iter(loader)
    next(batches)
    with pytest.raises(UserError, match=r"spoilt\.beton: image 2 is damaged"):
        next(batches)


def test_files_that_are_damaged_or_too_small_are_refused(files, tmp_path):
    path, source = files["square"]
    short = tmp_path / "short.beton"
    short.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"short\.beton: truncated"):
        load({"short": (short, source)}, "short", spec_of())
    with pytest.raises(UserError, match="holds 203 samples"):
        load(files, "square", spec_of(), np.arange(SAMPLES + 1))
    with pytest.raises(UserError, match="batch_size=300 is more than the 203"):
        load(files, "square", spec_of(), shard=Shard(0, 1, 300))


def test_workers_are_capped_and_torch_keeps_its_threads(files):
    assert load(files, "square", spec_of(), workers=1000).workers <= allowed_cpus()
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        loader = load(files, "square", spec_of(), workers=2)
        batches = iter(loader)
        next(batches)
        assert torch.get_num_threads() == 3
        loader.close()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def run(program: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", textwrap.dedent(program)]
    return subprocess.run(words, capture_output=True, text=True, timeout=240, check=False)


def test_import_keeps_torch_threads_and_the_process_ends_quietly(files):
    done = run(f"""
        import torch
        torch.set_num_threads(3)
        import numpy as np
        from pathlib import Path
        from utils.data import beton_format, ffcv_loader
        assert torch.get_num_threads() == 3
        from utils import params
        from utils.data.order import Shard
        from utils.data.spec import DataSpec
        spec = DataSpec("folder", Path("/"), Path("/"), 7, 16, 16, 400, "raw", "crop", True, (0., 0., 0.),
                        (1., 1., 1.), 1.0, params.Data())
        loader = ffcv_loader.make(spec, Path({str(files["square"][0])!r}), np.arange(203), Shard(0, 1, 20),
            torch.device("cpu"), training=True, order_seed=0, channels_last=True, workers=1, eval_batch_size=20)
        print(sum(len(labels) for _, labels in loader))
        held = iter(loader)
        next(held)  # and the process ends with the thread at work
    """)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "200\n"
    assert done.stderr == ""


def test_files_pass_between_this_writer_and_ffcvs_own(files, tmp_path, capfd):
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    source = files["mixed"][1]
    pairs = [(image, int(label)) for image, label in zip(source.images, source.labels, strict=True)]
    for mode in ("raw", "jpg"):
        own = tmp_path / f"own-{mode}.beton"
        fields = {"image": RGBImageField(write_mode=mode, max_resolution=50, jpeg_quality=90), "label": IntField()}
        DatasetWriter(str(own), fields, num_workers=1).from_indexed_dataset(pairs)
        capfd.readouterr()
        turned = tmp_path / f"turned-{mode}.beton"
        fields = dict(reversed(fields.items()))
        DatasetWriter(str(turned), fields, num_workers=1).from_indexed_dataset([pair[::-1] for pair in pairs])
        capfd.readouterr()
        spec = spec_of(mode, plain=True)
        assert beton.check(own, spec, "train")["samples"] == 60
        assert beton.labels(own).tolist() == source.labels.tolist()
        ours = tmp_path / f"ours-{mode}.beton"
        beton.write(source, ours, DataSpec(**{**vars(spec), "max_resolution": 50}), 1)
        assert beton.labels(turned).tolist() == source.labels.tolist()
        first, *others = [read(load({"x": (f, source)}, "x", spec, training=False)) for f in (ours, own, turned)]
        assert all(same(first, other) for other in others)


def test_ffcvs_own_loader_reads_what_is_written(files, tmp_path):
    """In a process of its own: FFCV's loader changes numba's types in place."""
    path, source = files["square"]
    done = run(f"""
        import numpy as np, torch
        from ffcv.loader import Loader, OrderOption
        loader = Loader({str(path)!r}, 10, num_workers=1, order=OrderOption.SEQUENTIAL, drop_last=False)
        images, labels = (torch.cat(parts) for parts in zip(*((a.clone(), b.clone()) for a, b in loader)))
        np.savez({str(tmp_path / "read.npz")!r}, images=images.numpy(), labels=labels.numpy())
    """)
    assert done.returncode == 0, done.stderr
    got = np.load(tmp_path / "read.npz")
    assert np.array_equal(got["images"], np.stack(source.images))
    assert got["labels"].reshape(-1).tolist() == source.labels.tolist()


def test_numbas_types_stay_as_they_are(files):
    """FFCV's loader marks numba's one type of byte arrays read-only, after which compiled code is not found again."""
    arrays = [numba.types.uint8[::1], numba.types.uint64[::1], numba.types.uint8[:, ::1], numba.types.uint32[::1]]
    for os_cache in (True, False):
        read(load(files, "square", spec_of(os_cache=os_cache)))
    assert all(array.mutable for array in arrays)
