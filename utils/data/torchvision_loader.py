"""Loader `torchvision`: image files decoded and augmented by Pillow and torchvision in worker processes.

The fallback when FFCV is not installed, and the only loader with RandAugment. Workers are handed whole batches
together with the epoch's key, so they hold no state: any number of them gives the same pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode, RandAugment
from torchvision.transforms import functional as F

from utils.data import augment, stateless
from utils.data.batching import Batching
from utils.data.decode import centre_square
from utils.data.order import Shard
from utils.data.protocol import Batch, Source
from utils.data.spec import DataSpec
from utils.system.errors import UserError

Change = Callable[[Image.Image, int, int], Image.Image]
"""(image, its place in the batch, side wanted) -> the image as the network sees it."""


class Request(NamedTuple):
    """One batch to make: source indices, the epoch's key and the image side."""

    indices: np.ndarray
    key: int
    size: int


class Made(NamedTuple):
    """A batch a worker made: uint8 [B, S, S, 3], int64 [B], source indices; or only the error to raise."""

    images: torch.Tensor
    labels: torch.Tensor
    indices: np.ndarray
    error: str


class TorchvisionLoader(Batching):
    """A `Loader` over a `Source`. One worker means this process itself; of more, those for training stay until `close`.

    Training images: the centre square at image_size, with a padded crop or none, or a random resized crop of the whole
    image; mirror; RandAugment; cutout. Evaluation: centre crop by eval_ratio, resized. A new iteration ends one that
    still runs.
    """

    def __init__(
        self,
        spec: DataSpec,
        source: Source,
        indices: np.ndarray,
        shard: Shard,
        device: torch.device,
        *,
        training: bool,
        order_seed: int,
        channels_last: bool,
        workers: int,
        eval_batch: int,
    ) -> None:
        super().__init__(indices, shard, training=training, order_seed=order_seed, eval_batch=eval_batch)
        self.spec, self.device, self.channels_last = spec, device, channels_last
        self._pixels = Pixels(spec, source, training)
        self._workers = workers if workers > 1 else 0
        self._mean = torch.tensor(spec.mean, dtype=torch.float32, device=device)
        self._std = torch.tensor(spec.std, dtype=torch.float32, device=device)
        self._requests: list[Request] = []
        self._loader: DataLoader[Any] | None = None
        self._iterator: Any = None
        self._running = 0

    def __iter__(self) -> Iterator[Batch]:
        # What set_epoch chose is read here, not at the first batch.
        size = (self.size or self.spec.image_size) if self.training else self.spec.eval_size
        requests = [Request(self.indices[positions], self.key, size) for positions in self.begin()]
        self._running += 1
        return self._iterate(requests, self._running, size)

    def _iterate(self, requests: list[Request], number: int, size: int) -> Iterator[Batch]:
        self._check_newest(number)
        if not requests:
            return
        self._requests[:] = requests
        self._iterator = iter(self._open())
        try:
            for count, made in enumerate(self._iterator, start=1):
                if made.error:
                    raise UserError(made.error)
                yield self._finish(made, requests[0].key, size)
                if count < len(requests):  # an iterator that was stopped would end here without a word
                    self._check_newest(number)
        except UserError:
            self.close()
            raise
        finally:
            if not self.training and number == self._running:
                self._stop()

    def _check_newest(self, number: int) -> None:
        if number != self._running:
            raise RuntimeError("this iteration was ended by a newer one of the same loader, or by its close")

    def _open(self) -> DataLoader[Any]:
        if self._loader is None:
            self._loader = DataLoader(
                self._pixels,
                batch_size=None,
                sampler=self._requests,  # read anew by every iteration
                num_workers=self._workers,
                persistent_workers=self._workers > 0 and self.training,
                collate_fn=_as_it_is,
                pin_memory=self.device.type == "cuda",
                generator=torch.Generator(),  # else every iteration would draw from torch's global one
            )
        return self._loader

    def _stop(self) -> None:
        """Stop the workers at once, rather than when the last reference to their iterator goes."""
        iterator, self._iterator, self._loader = self._iterator, None, None
        if hasattr(iterator, "_shutdown_workers"):
            iterator._shutdown_workers()

    def close(self) -> None:
        """Stop the worker processes; a later iteration starts new ones."""
        self._running += 1
        self._stop()

    def _finish(self, made: Made, key: int, size: int) -> Batch:
        """Move to the device, normalise, cut out."""
        images = augment.normalise(
            made.images.to(self.device, non_blocking=True), self._mean, self._std, self.channels_last
        )
        cutout = self.spec.data.cutout
        if self.training and cutout:
            side = augment.cutout_side(cutout, self.spec.image_size, size)
            corners = torch.from_numpy(augment.cutout_corners(key, made.indices, size, side))
            augment.erase(images, corners.to(self.device, non_blocking=True), side)
        return images, made.labels.to(self.device, non_blocking=True)


def _as_it_is(made: Any) -> Any:
    return made


class Pixels(Dataset[Made]):
    """Makes the batch of a `Request`; what runs in the workers."""

    def __init__(self, spec: DataSpec, source: Source, training: bool) -> None:
        self.spec, self.source, self.training = spec, source, training
        self._randaugment = RandAugment(
            spec.data.randaugment, spec.data.randaugment_magnitude, interpolation=InterpolationMode.BILINEAR
        )

    def __getitem__(self, request: Request) -> Made:
        size = request.size
        pixels = np.empty((len(request.indices), size, size, 3), dtype=np.uint8)
        labels = torch.from_numpy(self.source.labels[request.indices])
        change = self._augmented(request) if self.training else self._centred
        try:
            for place, index in enumerate(request.indices.tolist()):
                pixels[place] = np.asarray(change(self.source.image(index), place, size))
        except UserError as error:  # handed over as text: a worker's exception arrives wrapped in its traceback
            return Made(torch.empty(0), torch.empty(0), request.indices, str(error))
        return Made(torch.from_numpy(pixels), labels, request.indices, "")

    def _centred(self, image: Image.Image, place: int, size: int) -> Image.Image:
        return centre_square(image, self.spec.eval_ratio, size)

    def _augmented(self, request: Request) -> Change:
        """What training does to the image at each place of a batch; its random numbers are drawn for all at once."""
        spec, whole, key, indices = self.spec, self.spec.image_size, request.key, request.indices
        corners = (augment.crop_offsets(key, indices, spec.data.pad) - spec.data.pad).tolist()
        mirrored = (augment.flips(key, indices) & spec.flip).tolist()

        def change(image: Image.Image, place: int, size: int) -> Image.Image:
            if spec.augment == "rrc":
                height, width = np.array([image.height]), np.array([image.width])
                box = augment.rrc_boxes(key, indices[place : place + 1], height, width)[0].tolist()
                image = F.resized_crop(image, *box, [size, size], InterpolationMode.BILINEAR)
            else:
                image = centre_square(image, 1.0, whole)
                if spec.augment == "crop":  # beyond the image is black, pixel value 0
                    image = F.crop(image, *corners[place], whole, whole)
                image = centre_square(image, 1.0, size)
            if mirrored[place]:
                image = F.hflip(image)
            return self._randaugmented(image, key, int(indices[place])) if spec.data.randaugment else image

        return change

    def _randaugmented(self, image: Image.Image, key: int, index: int) -> Image.Image:
        with torch.random.fork_rng(devices=[]):  # RandAugment draws from torch's global generator
            torch.default_generator.manual_seed(stateless.derive("randaugment", key, index))
            return self._randaugment(image)
