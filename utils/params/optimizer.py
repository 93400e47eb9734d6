"""Section `optimizer`."""

from __future__ import annotations

from dataclasses import dataclass

from utils.params.field import param


@dataclass(frozen=True)
class Optimizer:
    """The optimizer and its constants."""

    name: str = param("sgd", "optimizer", kind="optimizer")
    lr: float = param(0.1, "peak learning rate", above=0.0)
    momentum: float = param(0.9, "SGD momentum", low=0.0, below=1.0)
    nesterov: bool = param(False, "Nesterov momentum (sgd)")
    betas: tuple[float, ...] = param((0.9, 0.999), "moment decays (adam, adamw)", low=0.0, below=1.0)
    eps: float = param(1e-8, "denominator term (adam, adamw)", above=0.0)
    weight_decay: float = param(5e-4, "weight decay", low=0.0)
    decay_norms_and_biases: bool = param(True, "apply weight decay to norms and biases too")
    decay_depthwise: bool = param(True, "apply weight decay to depthwise convolutions too")
