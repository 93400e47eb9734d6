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
    reduction: str = param(
        "auto",
        "gradients over ranks: dense, or packed: kept entries alone; auto: packed on CPUs of several nodes",
        choices=("auto", "dense", "packed"),
        hashed=False,
    )
    packed_below: float = param(
        0.5, "packed reduction: buckets of a larger density go as a whole", above=0.0, high=1.0, hashed=False
    )
