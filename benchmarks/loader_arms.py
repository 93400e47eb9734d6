"""The arms of `benchmarks.loader`: each in a process of its own that reads an epoch whenever it is asked.

`python -m benchmarks.loader_arms NAME [FILE] [RESIZE]` answers each line of its input with one line of numbers.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import io
import itertools
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks import measure, processes
from utils import params
from utils.data import augment, beton_format
from utils.data.order import Shard
from utils.data.spec import DataSpec

SIDE, BATCH = 224, 64
CPU = torch.device("cpu")
CIFAR_IMAGES, CIFAR_BATCH = 5120, 128


def spec_of(mode: str = "jpg", resize: str = "ffcv", **changes: Any) -> DataSpec:
    """ImageNet's settings for files of `mode`: random resized crops of 224 pixels, mirrored at random."""
    settled: dict[str, Any] = {
        "name": "folder", "directory": Path("pictures"), "betons": Path("pictures"), "classes": 10,
        "image_size": SIDE, "eval_size": SIDE, "max_resolution": 500, "write_mode": mode, "augment": "rrc",
        "flip": True, "mean": (120.0, 115.0, 105.0), "std": (60.0, 59.0, 61.0), "eval_ratio": 0.875,
        "data": params.Data(name="folder", resize=resize),
    }  # fmt: skip
    return DataSpec(**{**settled, **changes})


class Process(processes.Process):
    """An arm of the loaders; its cost is seconds an image of the next epoch, CPU time or, on a GPU, wall clock.

    choice: data.resize of the stored images' arms; the device of those without a file.
    """

    def __init__(self, name: str, path: Path | None, choice: str = "ffcv") -> None:
        super().__init__("benchmarks.loader_arms", name, str(path or ""), choice, name=name)


# The arms: each gives a function that reads epoch `number` and returns how many images it held ---------------------

Epoch = Callable[[int], int]


def counted(batches: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> int:
    """Images of an epoch of bytes, looked at once as a training loop would."""
    count = 0
    for images, _ in batches:
        assert images.dtype == torch.uint8
        assert sorted(images.shape[1:]) == [3, SIDE, SIDE]
        count += len(images)
    return count


def sieve_loader(path: Path, resize: str, workers: int = 1) -> Any:
    from utils.data.ffcv_loader import FFCVLoader

    samples = beton_format.read_header(path).samples
    return FFCVLoader(
        spec_of(resize=resize), path, np.arange(samples), Shard(0, 1, BATCH, 1), CPU,
        training=True, order_seed=3, channels_last=True, workers=workers, eval_batch=BATCH,
    )  # fmt: skip


def sieve_bytes(loader: Any, number: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The loader's batches before normalisation: what its reader hands over, as the peers give them."""
    from utils.data.ffcv_epoch import EpochReader

    loader.set_epoch(0, number)
    batches = [np.ascontiguousarray(loader.indices[places]) for places in loader.begin()]
    reader = EpochReader(loader._pipeline, loader._job(batches, loader.key), CPU, loader.workers)
    try:
        yield from reader.read(lambda _, images, labels: (images, labels))
    finally:
        reader.close()


def sieve(path: Path, resize: str) -> Epoch:
    """This repository's FFCV loader."""
    loader = sieve_loader(path, resize)
    return lambda number: counted(sieve_bytes(loader, number))


def ffcv(path: Path, _: str) -> Epoch:
    """FFCV's own loader, decoder and mirror, as its documentation puts them together."""
    from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, Squeeze, ToTensor

    loader = Loader(
        str(path), batch_size=BATCH, num_workers=1, order=OrderOption.RANDOM, os_cache=True, drop_last=True, seed=3,
        pipelines={
            "image": [RandomResizedCropRGBImageDecoder((SIDE, SIDE)), RandomHorizontalFlip(), ToTensor()],
            "label": [IntDecoder(), ToTensor(), Squeeze()],
        },
    )  # fmt: skip
    return lambda _: counted(iter(loader))


class Stored(Dataset[tuple[torch.Tensor, int]]):
    """The same JPEG bytes as a map-style data set; `decode` makes RGB of them, `resize` an image of the crop."""

    def __init__(self, path: Path, one: Callable[[np.ndarray, int, int, tuple[int, ...]], np.ndarray]) -> None:
        header = beton_format.read_header(path)
        self.table = beton_format.image_table(header, beton_format.read_metadata(header)).tolist()
        self.bytes = np.memmap(path, np.uint8, "r")
        self.one, self.rng = one, np.random.default_rng(0)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        offset, size, height, width, _ = self.table[index]
        image = self.one(self.bytes[offset : offset + size], height, width, self.box(height, width))
        if self.rng.random() < 0.5:
            image = image[:, ::-1]
        return torch.from_numpy(np.require(image, requirements=("C", "W"))), index % 10

    def box(self, height: int, width: int) -> tuple[int, ...]:
        """torchvision's RandomResizedCrop.get_params, in plain numbers."""
        for _ in range(10):
            area = height * width * self.rng.uniform(*augment.RRC_AREA)
            ratio = math.exp(self.rng.uniform(math.log(augment.RRC_RATIO[0]), math.log(augment.RRC_RATIO[1])))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return int(self.rng.integers(height - h + 1)), int(self.rng.integers(width - w + 1)), h, w
        side = min(height, width)
        return (height - side) // 2, (width - side) // 2, side, side


def dataloader(path: Path, one: Callable[[np.ndarray, int, int, tuple[int, ...]], np.ndarray]) -> Epoch:
    """A torch DataLoader in this process: its workers' CPU time would be the same and their queues come on top."""
    loader = DataLoader(Stored(path, one), BATCH, shuffle=True, drop_last=True)
    return lambda _: counted(iter(loader))


def turbojpeg(path: Path, _: str) -> Epoch:
    """libturbojpeg decodes the whole image, OpenCV resizes the crop bilinearly."""
    import cv2

    cv2.setNumThreads(0)
    library = ctypes.CDLL(ctypes.util.find_library("turbojpeg") or "libturbojpeg.so.0")
    library.tjInitDecompress.restype = ctypes.c_void_p
    pointer, number = ctypes.c_void_p, ctypes.c_int
    library.tjDecompress2.argtypes = [pointer, pointer, ctypes.c_ulong, pointer, *(number,) * 5]
    handle = library.tjInitDecompress()

    def one(data: np.ndarray, height: int, width: int, box: tuple[int, ...]) -> np.ndarray:
        whole = np.empty((height, width, 3), np.uint8)
        if library.tjDecompress2(handle, data.ctypes.data, data.size, whole.ctypes.data, width, 0, height, 0, 0):
            raise RuntimeError("libturbojpeg cannot decode a picture")
        y, x, h, w = box
        return cv2.resize(whole[y : y + h, x : x + w], (SIDE, SIDE), interpolation=cv2.INTER_LINEAR)

    return dataloader(path, one)


def pillow(path: Path, _: str) -> Epoch:
    """Pillow decodes, torchvision's functions crop and resize, as its reference training code does."""
    from PIL import Image
    from torchvision.transforms import functional

    def one(data: np.ndarray, height: int, width: int, box: tuple[int, ...]) -> np.ndarray:
        image = Image.open(io.BytesIO(data.tobytes())).convert("RGB")
        return np.asarray(functional.resized_crop(image, *box, [SIDE, SIDE]))

    return dataloader(path, one)


class Small:
    """CIFAR-10's shape, filled with noise: neither arm's time depends on what the images show."""

    def __init__(self) -> None:
        self.pixels = np.random.default_rng(0).integers(0, 256, (CIFAR_IMAGES, 32, 32, 3), dtype=np.uint8)
        self.labels, self.classes = np.arange(CIFAR_IMAGES) % 10, [str(number) for number in range(10)]

    def __len__(self) -> int:
        return len(self.pixels)

    def image(self, index: int) -> Any:
        from PIL import Image

        return Image.fromarray(self.pixels[index])

    def digest(self) -> str:
        return "noise"


def device(_: Path, where: str) -> Epoch:
    """The `device` loader: padded crops, mirrors, normalised float32."""
    from utils.data.device_loader import DeviceLoader

    place = torch.device(where)

    spec = spec_of(image_size=32, eval_size=32, augment="crop", eval_ratio=1.0)
    loader = DeviceLoader(
        spec, Small(), np.arange(CIFAR_IMAGES), Shard(0, 1, CIFAR_BATCH, 1), place,
        training=True, order_seed=3, channels_last=True, workers=1, eval_batch=CIFAR_BATCH,
    )  # fmt: skip

    def epoch(number: int) -> int:
        loader.set_epoch(0, number)
        count = sum(len(images) for images, _ in loader)
        measure.wait(place)
        return count

    return epoch


def torchvision(_: Path, where: str) -> Epoch:
    """What torchvision's CIFAR10 and its usual transforms do, in a DataLoader, then on the device."""
    from torchvision import transforms

    place = torch.device(where)
    small = Small()
    change = transforms.Compose([
        transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), transforms.ToTensor(),
        transforms.Normalize((0.49, 0.48, 0.45), (0.25, 0.24, 0.26)),
    ])  # fmt: skip

    class Cifar(Dataset[tuple[torch.Tensor, int]]):
        def __len__(self) -> int:
            return len(small)

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            return change(small.image(index)), int(small.labels[index])

    loader = DataLoader(Cifar(), CIFAR_BATCH, shuffle=True, drop_last=True)

    def epoch(_: int) -> int:
        count = sum(len(images.to(place)) for images, _ in loader)
        measure.wait(place)
        return count

    return epoch


ARMS = {one.__name__: one for one in (sieve, ffcv, turbojpeg, pillow, device, torchvision)}


# Gates ---------------------------------------------------------------------------------------------------------------


def differing(path: Path) -> tuple[int, int]:
    """Pixels of an epoch that differ from FFCV's whole decode and resize of the same box, and how many there are."""
    from utils.data.ffcv_import import ctypes_imdecode, ctypes_resize

    loader = sieve_loader(path, "ffcv")
    header = beton_format.read_header(path)
    table = beton_format.image_table(header, beton_format.read_metadata(header))
    stored, wrong, total = np.fromfile(path, np.uint8), 0, 0
    loader.set_epoch(0, 1)
    order = np.concatenate([loader.indices[places] for places in loader.begin()])
    boxes = augment.rrc_boxes(loader.key, order, table[order, 2], table[order, 3])
    flips = augment.flips(loader.key, order)
    images = torch.cat([images.clone() for images, _ in sieve_bytes(loader, 1)]).numpy()
    for sample, (y, x, h, w), flipped, image in zip(order, boxes.tolist(), flips, images, strict=True):
        offset, size, height, width, mode = table[sample].tolist()
        data = stored[offset : offset + size]
        whole, wanted = np.empty((height, width, 3), np.uint8), np.empty((SIDE, SIDE, 3), np.uint8)
        if mode == beton_format.RAW:
            whole[:] = data.reshape(whole.shape)
        else:
            ctypes_imdecode(
                data.ctypes.data, size, height, width, whole.ctypes.data, height, width, 0, 0, 1, 1, False, False
            )
        ctypes_resize(0, whole.ctypes.data, height, width, y, y + h, x, x + w, wanted.ctypes.data, SIDE, SIDE)
        wrong += int((image != (wanted[:, ::-1] if flipped else wanted)).any(axis=2).sum())
        total += SIDE * SIDE
    return wrong, total


def digest(path: Path, resize: str, workers: int) -> tuple[float, float]:
    """Two numbers that change when any pixel of an epoch does."""
    loader = sieve_loader(path, resize, workers)
    images = torch.cat([images.clone() for images, _ in sieve_bytes(loader, 1)]).reshape(-1)
    weights = torch.arange(len(images), dtype=torch.int64) % 65521
    return float(images.sum(dtype=torch.int64)), float((images * weights).sum(dtype=torch.int64))


# The process ---------------------------------------------------------------------------------------------------------


def serve(name: str, path: Path, choice: str) -> None:
    """Answer the lines of the input until it ends."""
    torch.set_num_threads(1)
    epoch = ARMS[name](path, choice) if name in ARMS else None
    clock = measure.clock(torch.device("cuda" if choice == "cuda" else "cpu"))
    numbers = itertools.count()

    def answer(words: list[str]) -> tuple[float, ...]:
        if words[0] == "compare":
            return differing(Path(words[1]))
        if words[0] == "digest":
            return digest(Path(words[1]), words[2], int(words[3]))
        assert epoch is not None
        start = clock()
        images = epoch(next(numbers))
        return clock() - start, images

    processes.serve(answer)


if __name__ == "__main__":
    serve(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
