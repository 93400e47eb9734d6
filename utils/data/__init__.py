"""Data sets, splits and loaders. `prepare` once before the process group starts, then `build` on every rank."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from utils.data.datasets import SPLITS, open_split
from utils.data.datasets.sources import MissingData
from utils.data.order import Shard
from utils.data.protocol import Batch, Loader
from utils.data.resolve import resolve
from utils.data.scoring import ScoringBatches, micro_batches
from utils.data.spec import DataSpec
from utils.data.splits import split, subset
from utils.params import Data, Params
from utils.system.cpus import allowed_cpus
from utils.system.distributed import from_main, world
from utils.system.errors import UserError
from utils.system.imports import uncollected

__all__ = [
    "DataSpec",
    "Loader",
    "Loaders",
    "ScoringBatches",
    "Shard",
    "build",
    "count_training",
    "default_workers",
    "prepare",
    "resolve",
    "take",
]

if TYPE_CHECKING:
    from utils.data.device_loader import DeviceLoader
    from utils.data.torchvision_loader import TorchvisionLoader

log = logging.getLogger(__name__)


@dataclass
class Loaders:
    """The loaders of a run. `val` is None when data.val is 0; `loader` is the kind really used."""

    train: Loader
    val: Loader | None
    test: Loader
    spec: DataSpec
    digests: dict[str, str]
    """Hex digest of what was read, by split ("train", "test")."""
    loader: str
    open_scoring: Callable[[int | None, int | None, int, int, int], ScoringBatches]
    """(images per class, micro-batches, batch size, rank, ranks), as in `scoring`."""

    def scoring(
        self, *, per_class: int | None, batches: int | None, batch_size: int, rank: int, ranks: int
    ) -> ScoringBatches:
        """Training images to score on, shown as in evaluation, never held-out ones: `rank`'s share of micro-batches.

        Either `per_class` images of every class, in as few micro-batches of nearly equal sizes as `batch_size` allows,
        or `batches` micro-batches of `batch_size`. What each of them holds depends on the order seed, not
        on the ranks or the kind of loader. The caller closes it. Raises UserError when there are too few images.
        """
        return self.open_scoring(per_class, batches, batch_size, rank, ranks)

    def close(self) -> None:
        """Stop all threads and processes; the loaders can be iterated again afterwards."""
        for one in (self.train, self.val, self.test):
            if one is not None:
                one.close()


@dataclass
class _Opened:
    """Both splits of a data set, ready for loaders. `make` takes (split, indices, training, shard, eval_batch)."""

    labels: np.ndarray
    test_samples: int
    digests: dict[str, str]
    make: Callable[[str, np.ndarray, bool, Shard, int], Loader]


def default_workers(local_size: int) -> int:
    """Loader workers of each of `local_size` ranks on a node: its share of the allowed CPUs, at least 1."""
    return max(1, allowed_cpus() // local_size)


def prepare(params: Params) -> None:
    """Download the data set and write its .beton files where they are missing.

    Every process of a node may call this at once, before the process group starts: one does the work under a file
    lock, with all allowed CPUs, the others wait for it; local rank 0 holds .beton files that are
    there against their source. Raises UserError when data is missing and cannot be had, or has changed, or data.resize
    needs a library that is missing.
    """
    data = params.data
    spec = resolve(data)
    if _usable(data.loader, warn=False) == "ffcv":
        from utils.data import beton, ffcv_native

        ffcv_native.ways(data.resize)
        beton.ensure(spec, data.workers or allowed_cpus(), data.download, compare=world().local_rank == 0)
        return
    for name in SPLITS:
        open_split(spec.name, spec.directory, name, data.download)


def build(params: Params, shard: Shard, device: torch.device, channels_last: bool, workers: int) -> Loaders:
    """Loaders of the training, val and test images for this rank, over data that `prepare` has seen to.

    val images are training images that are held out, shown as in evaluation. `workers` is capped to the allowed CPUs.
    Raises UserError when data is missing, damaged, or too little for one global batch.
    """
    data = params.data
    spec = resolve(data)
    kind = _usable(data.loader, warn=shard.rank == 0)
    order_seed = params.run.seed if data.order_seed is None else data.order_seed
    common: dict[str, Any] = {
        "device": device,
        "order_seed": order_seed,
        "channels_last": channels_last,
        "workers": max(1, min(workers, allowed_cpus())),
    }
    if kind == "ffcv" and shard.rank == 0:
        from utils.data import ffcv_native

        ffcv_native.tell(data.resize)
    opened = (_open_betons if kind == "ffcv" else _open_sources)(spec, kind, common)
    train, val = _indices(params, opened.labels, shard.batch_size)
    eval_batch = params.training.eval_batch_size or 2 * shard.micro_batch

    def open_scoring(
        per_class: int | None, batches: int | None, batch_size: int, rank: int, ranks: int
    ) -> ScoringBatches:
        chosen = micro_batches(
            train, opened.labels, order_seed, per_class=per_class, batches=batches, batch_size=batch_size
        )

        def open_loader(samples: np.ndarray, size: int) -> Loader:
            return opened.make("train", samples, False, Shard(), size)

        return ScoringBatches(chosen, open_loader, rank, ranks)

    return Loaders(
        train=opened.make("train", train, True, shard, eval_batch),
        val=opened.make("train", val, False, shard, eval_batch) if len(val) else None,
        test=opened.make("test", np.arange(opened.test_samples), False, shard, eval_batch),
        spec=spec,
        digests=opened.digests,
        loader=kind,
        open_scoring=open_scoring,
    )


def count_training(params: Params) -> int | None:
    """Training images after val split and subset, as `build` would use them; None when no data set is there.

    Reads labels alone, of the .beton file where it fits, else of the source; downloads and writes nothing. Raises
    UserError as `build` does for shares and batch sizes that leave too few.
    """
    labels = _labels_there(params)
    return None if labels is None else len(_indices(params, labels, params.training.batch_size)[0])


def _labels_there(params: Params) -> np.ndarray | None:
    from utils.data import beton

    spec = resolve(params.data)
    path = beton.path_of(spec, "train")
    if params.data.loader == "ffcv" and beton.sidecar_of(path).is_file():
        with contextlib.suppress(UserError):  # a run would refuse this file and say how to mend it
            beton.check(path, spec, "train")
            return beton.labels(path)
    try:
        return open_split(spec.name, spec.directory, "train").labels
    except MissingData:
        return None


def _indices(params: Params, labels: np.ndarray, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Which training images are trained on, and which are held out."""
    data = params.data
    train, val = split(labels, data.val, data.split_seed)
    if data.val > 0 and not len(val):
        raise UserError(f"data.val={data.val} holds out none of the {len(labels)} training images; raise it or set 0")
    if not len(train):
        raise UserError(f"data.val={data.val} holds out all of the {len(labels)} training images; lower it")
    if data.subset is not None:
        train = subset(train, labels, data.subset, data.split_seed)
    if len(train) < batch_size:
        raise UserError(
            f"training.batch_size={batch_size} is more than the {len(train)} training images"
            f"{_too_few_because(data, len(labels), batch_size)}"
        )
    return train, val


def _too_few_because(data: Data, images: int, batch_size: int) -> str:
    """What left fewer training images than a batch, and the mend."""
    if images < batch_size:
        return "; lower it"
    if data.subset is not None:
        return f" of data.subset={data.subset}; lower the one or raise the other"
    return f" that data.val={data.val} leaves; lower one of the two"


def _open_betons(spec: DataSpec, kind: str, common: dict[str, Any]) -> _Opened:
    from utils.data import beton
    from utils.data.ffcv_loader import FFCVLoader

    paths = {name: beton.path_of(spec, name) for name in SPLITS}
    digests = {name: str(beton.check(path, spec, name)["digest"]) for name, path in paths.items()}

    def make(name: str, indices: np.ndarray, training: bool, shard: Shard, eval_batch: int) -> Loader:
        return FFCVLoader(spec, paths[name], indices, shard, training=training, eval_batch=eval_batch, **common)

    return _Opened(beton.labels(paths["train"]), len(beton.labels(paths["test"])), digests, make)


def _open_sources(spec: DataSpec, kind: str, common: dict[str, Any]) -> _Opened:
    kind_of = _loader_class(kind)
    sources = {name: open_split(spec.name, spec.directory, name) for name in SPLITS}

    def make(name: str, indices: np.ndarray, training: bool, shard: Shard, eval_batch: int) -> Loader:
        return kind_of(spec, sources[name], indices, shard, training=training, eval_batch=eval_batch, **common)

    # One rank asks the file system for a million sizes, not all of them.
    digests = from_main(lambda: {name: source.digest() for name, source in sources.items()})
    return _Opened(sources["train"].labels, len(sources["test"]), digests, make)


def _loader_class(kind: str) -> type[DeviceLoader] | type[TorchvisionLoader]:
    if kind == "device":
        from utils.data.device_loader import DeviceLoader

        return DeviceLoader
    from utils.data.torchvision_loader import TorchvisionLoader  # seconds to import, so only where it is used

    return TorchvisionLoader


def _usable(kind: str, warn: bool) -> str:
    """The loader to use: `kind`, or torchvision, with one warning, where FFCV is asked for and cannot be imported."""
    trouble = _ffcv_trouble() if kind == "ffcv" else None
    if trouble is None:
        return kind
    if warn:
        log.warning("%s; reading images with the slower torchvision loader", trouble)
    return "torchvision"


def _ffcv_trouble() -> str | None:
    """Why FFCV cannot be used and what would install it, or None."""
    if importlib.util.find_spec("ffcv") is None:
        return (
            "ffcv is not installed: run make setup, or pip install ffcv after the system packages libopencv-dev, "
            "libturbojpeg0-dev and pkg-config"
        )
    try:
        with uncollected():
            importlib.import_module("utils.data.ffcv_import")
    except UserError as error:  # built for another Python, or a shared library is gone
        return str(error)
    return None


def take(loader: Loader, count: int) -> list[Batch]:
    """The next `count` batches, copied; the iteration is ended properly. Raises UserError when there are fewer."""
    iterator = iter(loader)
    try:
        batches = [(images.clone(), labels.clone()) for images, labels in itertools.islice(iterator, count)]
    finally:
        if hasattr(iterator, "close"):
            iterator.close()
    if len(batches) < count:
        raise UserError(f"{count} training batches are wanted and there are {len(batches)}; lower training.batch_size")
    return batches
