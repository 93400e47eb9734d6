"""Logits divided by a temperature before the loss."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from utils.system.errors import UserError


class Tempered(nn.Module):
    """`model` whose outputs are divided by `temperature`; it shares the modules and leaves their modes alone."""

    def __init__(self, model: nn.Module, temperature: float) -> None:
        super().__init__()
        self.model = model
        self.temperature = temperature
        self.training = model.training

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Logits / temperature."""
        logits: Tensor = self.model(*args, **kwargs)
        return logits / self.temperature


def tempered(model: nn.Module, temperature: float) -> nn.Module:
    """`model` with its logits divided by `temperature`; `model` itself at 1.

    Raises UserError for a temperature that is not a positive finite number.
    """
    if not (math.isfinite(temperature) and temperature > 0.0):
        raise UserError(f"pruning.criterion_options: temperature={temperature!r} is not above 0; write temperature=200")
    return model if temperature == 1.0 else Tempered(model, temperature)
