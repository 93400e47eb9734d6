"""The native library against Pillow and OpenCV: parts of JPEGs, scaled decoding, resizing, and data that is damaged."""

from __future__ import annotations

import io

import cv2
import numpy as np
import pytest
from PIL import Image

from tests.native_library import need_decoder
from utils import native


@pytest.fixture(autouse=True)
def _library() -> None:
    need_decoder()


def photo(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Soft shapes and noise, so that neighbouring blocks differ in luma and chroma."""
    coarse = rng.integers(0, 256, (-(-height // 6), -(-width // 6), 3), dtype=np.uint8)
    image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(image + rng.normal(0, 8, image.shape), 0, 255).astype(np.uint8)


def stored(image: np.ndarray, **options: object) -> bytes:
    handle = io.BytesIO()
    Image.fromarray(image).save(handle, "jpeg", **{"quality": 90, "subsampling": 2, **options})
    return handle.getvalue()


def array(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


def whole(data: bytes, scale: int = 1) -> np.ndarray:
    """Pillow's decoding; its draft mode is libjpeg's scaling."""
    image = Image.open(io.BytesIO(data))
    if scale > 1:
        image.draft("RGB", (image.width // scale, image.height // scale))
    return np.asarray(image.convert("RGB"))


def random_box(rng: np.random.Generator, height: int, width: int) -> native.Box:
    y, x = int(rng.integers(height)), int(rng.integers(width))
    return y, x, int(rng.integers(1, height - y + 1)), int(rng.integers(1, width - x + 1))


KINDS = [
    {"subsampling": 2},
    {"subsampling": 1},
    {"subsampling": 0},
    {"subsampling": 2, "progressive": True},
    {"subsampling": 2, "restart_marker_rows": 1},
    {"subsampling": 2, "quality": 30},
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_part_is_the_part_of_the_whole(kind: dict[str, object]) -> None:
    rng = np.random.default_rng(0)
    for height, width in ((1, 1), (7, 200), (64, 48), (97, 131), (250, 333), (375, 500)):
        data = stored(photo(rng, height, width), **kind)
        pixels = whole(data)
        boxes = [(0, 0, height, width), (height - 1, width - 1, 1, 1)]
        for box in boxes + [random_box(rng, height, width) for _ in range(12)]:
            y, x, h, w = box
            got = native.decode(array(data), height, width, box, exact=True)
            assert np.array_equal(got, pixels[y : y + h, x : x + w]), (height, width, box)


def test_every_offset_within_two_blocks() -> None:
    """Chroma upsampling reads across the edges of a part, and blocks begin at every 16th pixel."""
    data = stored(photo(np.random.default_rng(1), 64, 80))
    pixels = whole(data)
    for y in range(33):
        for x in range(33):
            got = native.decode(array(data), 64, 80, (y, x, 17, 18), exact=True)
            assert np.array_equal(got, pixels[y : y + 17, x : x + 18]), (y, x)


def test_grey_images_become_rgb() -> None:
    grey = photo(np.random.default_rng(2), 40, 56)[:, :, 0]
    handle = io.BytesIO()
    Image.fromarray(grey).save(handle, "jpeg", quality=90)
    got = native.decode(array(handle.getvalue()), 40, 56, (3, 5, 30, 40), exact=True)
    assert np.array_equal(got, whole(handle.getvalue())[3:33, 5:45])


@pytest.mark.parametrize("scale", [2, 4])
@pytest.mark.parametrize("subsampling", [0, 2])
def test_scaled_decoding_is_pillows_draft_mode(scale: int, subsampling: int) -> None:
    rng = np.random.default_rng(3)
    for height, width in ((64, 48), (97, 131), (250, 333)):
        data = stored(photo(rng, height, width), subsampling=subsampling)
        small = whole(data, scale)
        assert small.shape[:2] == (-(-height // scale), -(-width // scale))
        for y, x, h, w in [(0, 0, height, width), *(random_box(rng, height, width) for _ in range(12))]:
            first = [
                min((start + scale // 2) // scale, size - 1) for start, size in zip((y, x), small.shape, strict=False)
            ]
            last = [
                min(max((stop + scale // 2) // scale, begin + 1), size)
                for stop, begin, size in zip((y + h, x + w), first, small.shape[:2], strict=True)
            ]
            got = native.decode(array(data), height, width, (y, x, h, w), scale, exact=True)
            assert np.array_equal(got, small[first[0] : last[0], first[1] : last[1]]), (height, width, y, x, h, w)


def test_the_fast_transform_is_another_one_and_close() -> None:
    data = stored(photo(np.random.default_rng(4), 80, 80))
    fast, exact = (
        native.decode(array(data), 80, 80, (0, 0, 80, 80), exact=which).astype(int) for which in (False, True)
    )
    assert 0 < np.abs(fast - exact).mean() < 2


# Damage -----------------------------------------------------------------------------------------------------------


def test_damage_is_an_error_and_never_a_crash_nor_a_write_outside() -> None:
    rng = np.random.default_rng(5)
    height, width = 90, 120
    library, seen = native.load(), set()
    guarded = np.full(3 * height * width + 200, 173, np.uint8)
    placed = np.empty(6, np.int64)
    for number in range(600):
        data = bytearray(stored(photo(rng, height, width), **KINDS[number % len(KINDS)]))
        if number % 3 == 0:
            data = data[: int(rng.integers(1, len(data)))]
        else:
            for place in rng.integers(2, 700 if number % 3 == 1 else len(data), 1 + number % 9):
                data[min(place, len(data) - 1)] = rng.integers(256)
        box = random_box(rng, height, width)
        code = library.sieve_decode(
            array(bytes(data)).ctypes.data, len(data), height, width, *box, (1, 2, 4)[number % 3], number % 2,
            guarded[100:].ctypes.data, guarded.size - 200, placed.ctypes.data,
        )  # fmt: skip
        seen.add(code)
        assert code in (0, 1, 2)
        if code == 0:
            assert (placed >= 0).all()
            assert placed[0] * placed[1] <= height * width
            assert placed[2] + placed[4] <= placed[0]
            assert placed[3] + placed[5] <= placed[1]
        assert (guarded[:100] == 173).all()
        assert (guarded[-100:] == 173).all()
    assert seen == {0, 1, 2}
    # The thread's decoder is as good as new.
    data = stored(photo(rng, height, width))
    assert np.array_equal(native.decode(array(data), height, width, (0, 0, 90, 120), exact=True), whole(data))


def test_what_is_wrong_is_said() -> None:
    data = stored(photo(np.random.default_rng(6), 60, 70))
    for spoilt in (b"", b"x", data[:2], data[: len(data) // 2], b"\0" * 500, data.replace(b"\xff\xc0", b"\xff\xc3")):
        with pytest.raises(ValueError, match="damaged"):
            native.decode(array(spoilt), 60, 70, (0, 0, 60, 70))
    for height, width in ((60, 71), (70, 60), (61, 70)):
        with pytest.raises(ValueError, match="of another size"):
            native.decode(array(data), height, width, (0, 0, 10, 10))
    for box in ((-1, 0, 5, 5), (0, -1, 5, 5), (0, 0, 61, 5), (0, 0, 5, 71), (59, 0, 2, 1), (0, 0, 0, 5), (0, 0, 5, -1)):
        with pytest.raises(ValueError, match="does not have"):
            native.decode(array(data), 60, 70, box)
    with pytest.raises(ValueError, match="does not have"):
        native.decode(array(data), 60, 70, (0, 0, 9, 9), scale=8)


def test_a_buffer_that_is_too_small_is_left_alone() -> None:
    data = array(stored(photo(np.random.default_rng(11), 60, 70)))
    out, placed = np.full(3 * 60 * 70, 173, np.uint8), np.empty(6, np.int64)
    for capacity in (0, 1, 3 * 60 * 70 - 1):
        given = (data.ctypes.data, data.size, 60, 70, 0, 0, 60, 70, 1, 0, out.ctypes.data, capacity)
        assert native.load().sieve_decode(*given, placed.ctypes.data) == 1
        assert (out == 173).all()


def test_damage_after_the_part_is_not_seen() -> None:
    """What lies below the part is never read: that is where the time goes that is saved."""
    data = stored(photo(np.random.default_rng(7), 200, 70))
    got = native.decode(array(data[: 3 * len(data) // 4]), 200, 70, (0, 0, 40, 70), exact=True)
    assert np.array_equal(got, whole(data)[:40])


# Resizing ---------------------------------------------------------------------------------------------------------


def area_weights(size: int, wanted: int) -> np.ndarray:
    """[wanted, size]: the share of each output pixel that each source pixel covers."""
    edges = np.arange(wanted + 1) * size / wanted
    low, high = edges[:-1, None], edges[1:, None]
    pixel = np.arange(size)[None]
    return np.clip(np.minimum(high, pixel + 1) - np.maximum(low, pixel), 0, None) * wanted / size


def test_shrinking_takes_pixel_areas() -> None:
    rng = np.random.default_rng(8)
    for height, width, high, wide in ((300, 211, 224, 160), (100, 100, 33, 99), (64, 90, 64, 7), (50, 3, 20, 3)):
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        columns = np.tensordot(image.astype(np.float64), area_weights(width, wide), (1, 1)).transpose(0, 2, 1)
        exact = np.tensordot(area_weights(height, high), columns, 1)
        got = native.resize(image, (0, 0, height, width), high, wide)
        assert got is not None
        assert np.abs(got - exact).max() <= 0.6  # half of it is rounding


def test_bilinear_is_opencvs() -> None:
    rng = np.random.default_rng(9)
    for _ in range(150):
        height, width, high, wide = (int(side) for side in rng.integers(1, 200, 4))
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        wanted = cv2.resize(image, (wide, high), interpolation=cv2.INTER_LINEAR)
        got = native.resize(image, (0, 0, height, width), high, wide, bilinear=True)
        if got is None:
            assert (height, width) == (2 * high, 2 * wide)
            continue
        # OpenCV builds with other vector code may round a pixel the other way.
        assert np.abs(got.astype(int) - wanted).max() <= 1
        assert (got != wanted).mean() < 0.01


@pytest.mark.parametrize("bilinear", [False, True])
@pytest.mark.parametrize("sides", [(2, 40), (90, 200)], ids=["shrinks", "grows"])
def test_boxes_and_mirrors(bilinear: bool, sides: tuple[int, int]) -> None:
    rng, done = np.random.default_rng(10), 0
    for _ in range(60):
        height, width = (int(side) for side in rng.integers(50, 90, 2))
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        h, w = int(rng.integers(40, height + 1)), int(rng.integers(40, width + 1))
        y, x = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
        high, wide = (int(side) for side in rng.integers(*sides, 2))
        part = np.ascontiguousarray(image[y : y + h, x : x + w])
        plain = native.resize(part, (0, 0, h, w), high, wide, bilinear)
        boxed, mirrored = (native.resize(image, (y, x, h, w), high, wide, bilinear, which) for which in (False, True))
        if plain is None:
            assert boxed is None
            assert mirrored is None
            continue
        assert boxed is not None
        assert mirrored is not None
        assert np.array_equal(plain, boxed)
        assert np.array_equal(plain, mirrored[:, ::-1])
        done += 1
    assert done > 50


def test_whole_reductions_are_left_to_opencv_and_bad_boxes_refused() -> None:
    image = np.zeros((40, 60, 3), np.uint8)
    assert native.resize(image, (0, 0, 40, 60), 20, 20) is None
    assert native.resize(image, (0, 0, 40, 60), 20, 21) is not None
    assert native.resize(image, (0, 0, 40, 40), 20, 20, bilinear=True) is None
    for box in ((0, 0, 41, 60), (0, 1, 40, 60), (-1, 0, 5, 5), (0, 0, 0, 4)):
        with pytest.raises(ValueError, match="not within"):
            native.resize(image, box, 20, 20)
