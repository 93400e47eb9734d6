"""Section `distributed`."""

from __future__ import annotations

from dataclasses import dataclass

from utils.params.field import param


@dataclass(frozen=True)
class Distributed:
    """The process group that torchrun starts."""

    backend: str = param("auto", "auto: nccl on GPUs, gloo on CPUs", choices=("auto", "nccl", "gloo"), hashed=False)
    timeout: float = param(600.0, "seconds a collective may wait for another rank", above=0.0, high=1e6, hashed=False)
    find_unused_parameters: bool = param(False, "for models whose forward pass skips parameters")
    sync_batchnorm: bool = param(False, "BatchNorm statistics over all ranks at every step")
