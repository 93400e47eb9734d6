"""A finished level of a run, opened again: its config, network, weights and data."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from utils import data, files, models
from utils.data import Loaders
from utils.data.order import Shard
from utils.data.protocol import Loader
from utils.data.resolve import resolve
from utils.feasibility import build_model
from utils.params import Params
from utils.params.load import build
from utils.params.yaml_file import read_yaml
from utils.system.distributed import World, choose_device
from utils.system.errors import UserError
from utils.system.rundir import LevelDir, RunDir

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class OpenLevel:
    """The level's network with its weights, on `device` in eval mode, and the run's loaders."""

    params: Params
    model: nn.Module
    loaders: Loaders
    device: torch.device

    def images(self, split: str) -> Loader:
        """The split's loader; `train` is augmented. Raises UserError for a split the run has not."""
        if split not in SPLITS:
            raise UserError(f"--split={split}: choose one of {', '.join(SPLITS)}")
        found = {"train": self.loaders.train, "val": self.loaders.val, "test": self.loaders.test}[split]
        if found is None:
            raise UserError("--split=val: the run holds no images out (data.val=0); choose test")
        return found


def params_of(run: str | Path) -> Params:
    """The parameters of the run in folder `run`. Raises UserError where there is none."""
    config = RunDir(Path(run)).config
    if not config.is_file():
        raise UserError(f"{run}: not a run directory (no config.yaml in it)")
    return build(read_yaml(config))


def finished_weights(run: str | Path, number: int, key: str = "--level") -> Path:
    """Path of a finished level's weights. Raises UserError naming `key` for one that is not finished."""
    path = RunDir(Path(run)).level(number).weights
    if not path.is_file():
        raise UserError(f"{path}: missing; {key} names a level that is not finished")
    return path


@contextlib.contextmanager
def open_level(run: str | Path, number: int) -> Iterator[OpenLevel]:
    """Level `number` of the run in folder `run`. Raises UserError for a level that is not finished."""
    params = params_of(run)
    finished_weights(run, number)  # before any data is fetched
    data.prepare(params)
    device = choose_device(params.run.device, World())
    shard = Shard(batch_size=params.training.batch_size, accumulation=params.training.accumulation)
    workers = params.data.workers or data.default_workers(1)
    loaders = data.build(params, shard, device, False, workers)
    try:
        model = network_of(params, RunDir(Path(run)).level(number)).to(device)
        yield OpenLevel(params, model.eval(), loaders, device)
    finally:
        loaders.close()


def network_of(params: Params, place: LevelDir, average: bool = False) -> nn.Module:
    """The network of a finished level with its weights, on the CPU; what a structured run made smaller is rebuilt.

    average: the averaged weights (training.ema). Raises UserError naming the file that is missing or another network's.
    """
    weights = place.average if average else place.weights
    if not weights.is_file():
        raise UserError(f"{weights}: missing; name a level that is finished{' and has an average' if average else ''}")
    if place.widths.is_file():
        return models.rebuild(place.widths, weights)
    model = build_model(params, resolve(params.data), "")
    files.put_weights(model, files.load_weights(weights), str(weights))
    return model
