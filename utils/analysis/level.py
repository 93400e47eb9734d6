"""A finished level of a run, opened again: its config, network, weights and data."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from utils import data, files
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
from utils.system.rundir import RunDir

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
    weights = finished_weights(run, number)
    data.prepare(params)
    device = choose_device(params.run.device, World())
    shard = Shard(batch_size=params.training.batch_size, accumulation=params.training.accumulation)
    workers = params.data.workers or data.default_workers(1)
    loaders = data.build(params, shard, device, False, workers)
    try:
        model = build_model(params, resolve(params.data), "").to(device)
        files.put_weights(model, files.load_weights(weights), str(weights))
        yield OpenLevel(params, model.eval(), loaders, device)
    finally:
        loaders.close()
