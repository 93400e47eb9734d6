"""Learning gates on frozen random weights: the first stage of Pruning from Scratch (Wang et al. 2020).

One gate per unit, 1 at first, multiplies the channels behind the norm. Only gates are trained (Adam, constant rate) on
cross-entropy + penalty x (mean |gate| - target)^2, and clamped to [0, 1] after every step; weights and the affine
parameters of norms stay as they were drawn, running statistics move. The last gates count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from utils.pruning.structured.gates import attach_gates, gate_places
from utils.pruning.structured.groups import ChannelGroup
from utils.system.errors import UserError
from utils.tasks import Batch
from utils.tasks.classification import ImageClassification
from utils.training.extension import Extension


class GatedModel(nn.Module):
    """A model whose channels are multiplied by gates; frozen, its only parameters that learn."""

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[ChannelGroup],
        input_shape: tuple[int, int, int],
        frozen: bool = True,
    ) -> None:
        """`model` is on its device and is hooked from here on. groups: those that may be pruned.

        frozen: its own parameters do not learn.
        """
        super().__init__()
        device = next(model.parameters()).device
        self.names = [group.name for group in groups]
        self.values = nn.ParameterList([nn.Parameter(torch.ones(group.size, device=device)) for group in groups])
        self.model = model.requires_grad_(not frozen)
        self.gates: dict[str, nn.Parameter] = dict(zip(self.names, self.values, strict=True))
        self.places = gate_places(model, groups, "norm", input_shape)
        self._handles = attach_gates(model, self.places, self.gates)

    def release(self) -> None:
        """Take the gates off the model."""
        while self._handles:
            self._handles.pop().remove()

    def forward(self, images: Tensor) -> Tensor:
        """What the gated model makes of images."""
        out: Tensor = self.model(images)
        return out

    def all(self) -> Tensor:
        """All gates end to end."""
        return torch.cat(list(self.values))


class GateTask(ImageClassification):
    """Classification with the penalty that pulls the mean gate to a target while the model trains."""

    def __init__(self, gated: GatedModel, target: float, penalty: float, **options: Any) -> None:
        super().__init__(**options)
        self.gated, self.target, self.penalty = gated, target, penalty

    def loss(self, model: nn.Module, batch: Batch, key: int | None = None) -> tuple[Tensor, Tensor]:
        """Mean training loss with the penalty, and logits."""
        loss, logits = super().loss(model, batch, key)
        return loss + self.penalty * (self.gated.all().abs().mean() - self.target).square(), logits


class ClampGates(Extension):
    """Keeps gates in [0, 1] after every step; logs their mean and the share that is not 0."""

    def __init__(self, gated: GatedModel) -> None:
        self.gated = gated

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Clamp."""
        for value in self.gated.values:
            value.clamp_(0.0, 1.0)

    @torch.no_grad()
    def epoch_end(self, epoch: int) -> dict[str, float | None]:
        """`gates_mean` and `gates_open`."""
        gates = self.gated.all()
        return {"gates_mean": float(gates.mean()), "gates_open": float((gates > 0).double().mean())}


def checked_gates(gates: Mapping[str, Tensor], groups: Sequence[ChannelGroup], source: str) -> dict[str, Tensor]:
    """Gates read from a file. Raises UserError naming it unless they are those of `groups`."""
    for group in groups:
        if group.name not in gates or tuple(gates[group.name].shape) != (group.size,):
            raise UserError(f"{source}: has no gates for {group.size} channels of {group.name!r}; run its level again")
    return {group.name: gates[group.name] for group in groups}
