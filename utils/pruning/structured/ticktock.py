"""Gates and weights that train in turns (GateDecorators, You et al. 2019), as the moment `ticktock`.

A tick trains gates alone, 1 at first, and sums |gate * dL/dgate| over its steps: the score of a unit. Then units are
taken out. A tock trains weights and gates on cross-entropy + penalty x sum |gate|. Gates end in the norms they follow,
so a level's network is a stock one and the next tick begins with gates of 1; that changes neither the network's output
nor the scores, which are derivatives by the logarithm of a gate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from utils.pruning.structured.gates import Places
from utils.pruning.structured.learn import GatedModel
from utils.pruning.structured.verify import randomised
from utils.system.errors import UserError
from utils.tasks import Batch
from utils.tasks.classification import ImageClassification
from utils.training.extension import Extension

TOLERANCE = 1e-8
"""Of outputs with gates in their norms, computed in float64, as a share of the largest."""


class TockTask(ImageClassification):
    """Classification with an L1 penalty on the gates while the model trains."""

    def __init__(self, gated: GatedModel, penalty: float, **options: Any) -> None:
        super().__init__(**options)
        self.gated, self.penalty = gated, penalty

    def loss(self, model: nn.Module, batch: Batch, key: int | None = None) -> tuple[Tensor, Tensor]:
        """Mean training loss with the penalty, and logits."""
        loss, logits = super().loss(model, batch, key)
        return loss + self.penalty * self.gated.all().abs().sum(), logits


class GateImportance(Extension):
    """Sums |gate * dL/dgate| over the steps of a tick; steps whose gradients overflow count for nothing."""

    def __init__(self, gated: GatedModel, scale: Callable[[], float]) -> None:
        """scale: what gradients are multiplied by just now (loss scaling)."""
        self.gated, self.scale = gated, scale
        self.sums = {name: torch.zeros_like(gate, dtype=torch.float64) for name, gate in gated.gates.items()}

    @torch.no_grad()
    def after_backward(self, step: int) -> None:
        """Add this step's; gradients are those of the whole global batch."""
        found = {
            name: (gate.double() * gate.grad.double()).abs() / self.scale()
            for name, gate in self.gated.gates.items()
            if gate.grad is not None
        }
        if not found:
            return
        finite = torch.stack([value.isfinite().all() for value in found.values()]).all()
        for name, value in found.items():
            self.sums[name] += torch.where(finite, value, 0.0)

    @torch.no_grad()
    def epoch_end(self, epoch: int) -> dict[str, float | None]:
        """`gates_mean` and `gates_open`, the share above 0."""
        return gate_columns(self.gated)

    def state(self) -> dict[str, Tensor]:
        """The sums as `importance.<group>`."""
        return {f"importance.{name}": total.cpu().clone() for name, total in self.sums.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` returned. Raises UserError when it is another network's."""
        for name, total in self.sums.items():
            stored = state.get(f"importance.{name}")
            if stored is None or stored.shape != total.shape:
                raise UserError("the checkpoint is of another pruning.moment; remove it or set the moment it had")
            total.copy_(stored)


class GateColumns(Extension):
    """Logs the gates of a tock."""

    def __init__(self, gated: GatedModel) -> None:
        self.gated = gated

    def epoch_end(self, epoch: int) -> dict[str, float | None]:
        """`gates_mean` and `gates_open`, the share above 0."""
        return gate_columns(self.gated)


@torch.no_grad()
def gate_columns(gated: GatedModel) -> dict[str, float | None]:
    """Mean of all gates, and the share of them above 0."""
    gates = gated.all()
    return {"gates_mean": float(gates.mean()), "gates_open": float((gates > 0).double().mean())}


@torch.no_grad()
def fold_gates(gated: GatedModel) -> nn.Module:
    """The model that was gated, without hooks, trainable, its gates multiplied into what they follow."""
    gated.release()
    _fold(gated.model, gated.places, gated.gates)
    return gated.model.requires_grad_(True)


def check_foldable(model: nn.Module, gated: Callable[[nn.Module], GatedModel], shape: tuple[int, ...]) -> None:
    """Raise UserError unless gates on a copy of `model` can be folded: not behind an activation, say.

    gated: makes a gated model of a copy on the CPU, in float64.
    """
    generator = torch.Generator().manual_seed(0)
    probe = gated(randomised(model, generator)).eval()
    images = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        for gate in probe.values:
            gate.copy_(torch.rand(gate.shape, generator=generator) + 0.5)
            gate[::2] *= -1.0  # training may turn their sign
        expected = probe(images)
        found = fold_gates(probe)(images)
        size = float((found - expected).abs().max()) / max(float(expected.abs().max()), 1e-30)
    if not size <= TOLERANCE:
        raise UserError(
            "pruning.moment=ticktock: gates of this network do not fold into its norms (an activation inside them, or "
            "none behind a normalised weight); take a network of plain norms, such as torchvision's"
        )


def _fold(model: nn.Module, places: Places, gates: Mapping[str, Tensor]) -> None:
    modules = dict(model.named_modules())
    for name, entries in places.items():
        module = modules[name]
        for tensor in (module.weight, module.bias):
            if not isinstance(tensor, Tensor):
                continue
            for group, units in entries:
                gate = torch.cat([gates[group], gates[group].new_ones(1)])  # -1 is the last: not gated
                factor = gate[torch.as_tensor(units, device=gate.device)]
                tensor.mul_(factor.view([-1] + [1] * (tensor.dim() - 1)).to(tensor.dtype))
