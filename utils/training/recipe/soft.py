"""Soft activations (the ghost neurons of ToST, Jaiswal et al. 2022) in the place of ReLU, ReLU6 and Hardswish.

Published: a soft activation early in training; when and how it gives way is not. Here it is annealed to the stock one
and then swapped for the very module it stood for. Released: soft for good, never annealed (`recipe.soft.keep`).

    swish for ReLU     x * sigmoid(beta * x), beta from 1 to 20; as beta grows it tends to ReLU
    everything else    (1 - mix) * soft(x) + mix * stock(x), mix from 0 to 1
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from utils import params
from utils.masks import bare
from utils.system.errors import UserError
from utils.training.recipe import Inserted, at_step, step_of
from utils.training.recipe.ramp import Ramp, span

Function = Callable[[Tensor], Tensor]

_STOCK: dict[type[nn.Module], Function] = {
    nn.ReLU: functional.relu,
    nn.ReLU6: functional.relu6,
    nn.Hardswish: functional.hardswish,
}
"""Activations that are replaced, and what they compute, never in place."""


class Swish(nn.Module):
    """x * sigmoid(beta * x) (Ramachandran et al. 2017), beta in a buffer that no file holds."""

    beta: Tensor

    def __init__(self, beta: Tensor) -> None:
        """beta: 0-dim, above 0; shared, so that one write changes every layer."""
        super().__init__()
        self.register_buffer("beta", beta, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Any shape, kept."""
        return functional.silu(x * self.beta) / self.beta  # at beta 1 silu itself, bit for bit


class Blend(nn.Module):
    """(1 - mix) * soft(x) + mix * stock(x), mix in a buffer that no file holds."""

    mix: Tensor

    def __init__(self, soft: Function, stock: Function, mix: Tensor) -> None:
        """mix: 0-dim, 0 to 1; shared, so that one write changes every layer."""
        super().__init__()
        self.soft, self.stock = soft, stock
        self.register_buffer("mix", mix, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Any shape, kept."""
        return (1.0 - self.mix) * self.soft(x) + self.mix * self.stock(x)


class SoftActivations(Inserted):
    """Puts the soft activations in when made and the stock modules back at the end of the ramp.

    What the network holds is a function of the step alone.
    """

    def __init__(
        self, model: nn.Module, section: params.Recipe, total: int, steps_per_epoch: int, start: int = 0
    ) -> None:
        """total: steps of the level; start: step its training begins at. Raises UserError when nothing is soft."""
        soft = section.soft
        hold, self.end = span("recipe.soft", soft.hold, soft.end, total, steps_per_epoch)
        self._beta = Ramp(soft.beta, soft.beta_end, hold, self.end, soft.shape, soft.beta_end / soft.beta)
        self._mix = Ramp(0.0, 1.0, hold, self.end, soft.shape)
        self._layers = _Layers(bare(model), soft)
        self._over = False
        self._in = False
        self._at(start)
        self.insert()

    def before_step(self, step: int) -> None:
        """Set beta and mix of this step, or be over."""
        self._at(step)

    def after_step(self, step: int) -> None:
        """Swap the stock modules in once the next step is theirs, so that no evaluation comes between."""
        if step + 1 >= self.end:
            self._at(step + 1)

    def epoch_end(self, epoch: int) -> dict[str, float | None]:
        """Beta of swish or the mix of a blend; empty once the stock modules are in."""
        return {"soft": None if self._over else self._layers.value()}

    def insert(self) -> None:
        """Soft modules in, unless training is past them."""
        if not self._in and not self._over:
            self._layers.swap()
            self._in = True

    def remove(self) -> None:
        """Stock modules in."""
        if self._in:
            self._layers.swap_back()
            self._in = False

    def close(self) -> None:
        """Stock modules in, for good."""
        self._over = True
        self.remove()

    def state(self) -> dict[str, Tensor]:
        """The step."""
        return at_step(self._step)

    def load_state(self, state: dict[str, Tensor]) -> None:
        """What the network holds at that step."""
        self._at(step_of(state))

    def _at(self, step: int) -> None:
        self._step = step
        if step >= self.end:
            self.close()
        elif not self._over:
            self._layers.put(self._beta.at(step), self._mix.at(step))


def soften(model: nn.Module, section: params.Recipe) -> nn.Module:
    """As released: the soft activation for good. Returns the model; without `recipe.soft.keep` it is left alone."""
    if section.soft.kind is not None and section.soft.keep:
        layers = _Layers(bare(model), section.soft)
        layers.put(section.soft.beta, 0.0)
        layers.swap()
    return model


def check_soft(model: nn.Module, section: params.Recipe) -> None:
    """Raise UserError when soft activations are asked for and `model` has nothing to soften."""
    if section.soft.kind is not None and not section.soft.keep:
        _Layers(bare(model), section.soft)


class _Layers:
    """Every place of the model that holds a stock activation, and the soft module for it."""

    def __init__(self, model: nn.Module, section: params.recipe.Soft) -> None:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._beta = torch.tensor(section.beta, device=device)
        self._mix = torch.tensor(0.0, device=device)
        self._places: list[tuple[nn.Module, str, nn.Module, nn.Module]] = []
        made: dict[int, nn.Module] = {}
        for parent in model.modules():
            for name, child in parent.named_children():
                if type(child) in _STOCK:
                    soft = made.setdefault(id(child), self._soft(child, section))
                    self._places.append((parent, name, child, soft))
        if not self._places:
            raise UserError(
                f"recipe.soft.kind={section.kind}: {type(model).__name__} has no ReLU, ReLU6 or Hardswish module to "
                "soften; drop it"
            )
        self._value = self._beta if any(isinstance(soft, Swish) for soft in made.values()) else self._mix

    def _soft(self, module: nn.Module, section: params.recipe.Soft) -> nn.Module:
        if section.kind == "swish" and type(module) is nn.ReLU:
            return Swish(self._beta)
        beta = section.beta
        kinds: dict[str | None, Function] = {
            "swish": lambda x: functional.silu(x * beta) / beta,
            "mish": functional.mish,
            "gelu": functional.gelu,
        }
        return Blend(kinds[section.kind], _STOCK[type(module)], self._mix)

    def put(self, beta: float, mix: float) -> None:
        self._beta.fill_(beta)
        self._mix.fill_(mix)

    def value(self) -> float:
        return float(self._value)

    def swap(self) -> None:
        for parent, name, stock, soft in self._places:
            parent._modules[name] = soft.train(stock.training)

    def swap_back(self) -> None:
        for parent, name, stock, soft in self._places:
            parent._modules[name] = stock.train(soft.training)
