"""Optimizers: built from the `optimizer` section, and their state by parameter name.

A new optimizer is one function here: `(groups, params.Optimizer, device) -> torch.optim.Optimizer`. Its learning rate
is set before every step by the trainer, from the schedule.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from utils import params
from utils.masks import bare
from utils.system.errors import ParamError, UserError
from utils.system.registry import Registry, nearest

Groups = list[dict[str, Any]]
Builder = Callable[[Groups, params.Optimizer, torch.device], torch.optim.Optimizer]

optimizer: Registry[Builder] = Registry("optimizer")

_LAYERS = (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear, nn.MultiheadAttention, nn.RNNBase)
_POSITIONS = re.compile(r"pos_|_pos|pos(ition)?_?emb|position|(^|[._])rel(ative)?_|_rel($|[._])")
_LOOSE = re.compile(r"token|bias|scale|gamma|beta|gain|temperature")
_APART = "apart"
"""Marks a group of parameters that are an extension's, not the model's."""
_STATE = ((torch.optim.SGD, {"momentum_buffer"}), (torch.optim.Adam, {"step", "exp_avg", "exp_avg_sq"}))


@optimizer("sgd")
def sgd(groups: Groups, section: params.Optimizer, device: torch.device) -> torch.optim.Optimizer:
    """Stochastic gradient descent with momentum, Nesterov's by option."""
    if section.nesterov and section.momentum == 0.0:
        raise ParamError("optimizer.nesterov=true needs optimizer.momentum above 0")
    # With loss scaling, only a fused step on a GPU can skip itself without the host waiting for the device.
    fused = device.type == "cuda"
    built = torch.optim.SGD(
        groups,
        lr=section.lr,
        momentum=section.momentum,
        nesterov=section.nesterov,
        weight_decay=section.weight_decay,
        **({"fused": True} if fused else {"foreach": True}),
    )
    if fused:
        for group in built.param_groups:
            _still(built, group)
    return built


def _still(optimizer: torch.optim.SGD, group: dict[str, Any]) -> None:
    # The fused kernel leaves its new buffers unwritten when loss scaling skips the first step. From 0.0 the first step
    # computes momentum * 0 + gradient, which is what it starts with otherwise.
    if group["momentum"]:
        for p in group["params"]:
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p, requires_grad=False)


@optimizer("adam")
def adam(groups: Groups, section: params.Optimizer, device: torch.device) -> torch.optim.Optimizer:
    """Adam (Kingma and Ba 2015); weight decay is added to the gradient."""
    return torch.optim.Adam(groups, **_adam_options(section, device))


@optimizer("adamw")
def adamw(groups: Groups, section: params.Optimizer, device: torch.device) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019); weight decay is apart from the gradient."""
    return torch.optim.AdamW(groups, **_adam_options(section, device))


def _adam_options(section: params.Optimizer, device: torch.device) -> dict[str, Any]:
    if section.nesterov:
        raise ParamError(f"optimizer.nesterov=true is for optimizer.name=sgd, not {section.name}")
    if len(section.betas) != 2:
        raise ParamError(f"optimizer.betas needs two numbers, not {len(section.betas)}")
    # The fused CPU kernel walks weights, gradients and state in memory order, so their strides must agree: autograd and
    # DDP see to it for gradients, `load_optimizer_state` for state.
    fast = {"fused": True} if device.type in ("cpu", "cuda") else {"foreach": True}
    betas = (section.betas[0], section.betas[1])
    return {"lr": section.lr, "betas": betas, "eps": section.eps, "weight_decay": section.weight_decay, **fast}


def build_optimizer(model: nn.Module, section: params.Optimizer, device: torch.device) -> torch.optim.Optimizer:
    """The section's optimizer over all parameters of `model`, in model order, names in each group's `param_names`.

    With decay_norms_and_biases=false or decay_depthwise=false there are two groups, the second (norms, biases and the
    like; depthwise weights) without decay.
    Raises ParamError for constants that contradict each other.
    """
    build = optimizer[section.name]
    named = list(bare(model).named_parameters())
    decayed = {name for name, _ in named} if section.decay_norms_and_biases else decayed_names(model)
    if not section.decay_depthwise:
        decayed -= depthwise_names(model)
    if len(decayed) == len(named):
        return build([{"params": named}], section, device)
    groups: Groups = [
        {"params": [(name, p) for name, p in named if name in decayed]},
        {"params": [(name, p) for name, p in named if name not in decayed], "weight_decay": 0.0},
    ]
    return build([group for group in groups if group["params"]], section, device)


def decayed_names(model: nn.Module) -> set[str]:
    """Bare names of the parameters that keep weight decay when norms and biases are exempt.

    These are the weights of convolutions, linear, attention and recurrent layers and of embeddings. Exempt are norms
    of any library, biases, every vector, scales, class tokens, embeddings of position, and whatever the model itself
    lists in `no_weight_decay()` (timm's convention).
    """
    model = bare(model)
    own_list: Any = getattr(model, "no_weight_decay", None)
    spared: set[str] = set(own_list()) if callable(own_list) else set()
    found: set[str] = set()
    for prefix, module in model.named_modules():
        for leaf, p in module.named_parameters(recurse=False):
            name = f"{prefix}.{leaf}" if prefix else leaf
            if name not in spared and _decays(module, prefix, leaf, p):
                found.add(name)
    return found & {name for name, _ in model.named_parameters()}  # a tied weight goes by its first name alone


def depthwise_names(model: nn.Module) -> set[str]:
    """Bare names of the weights of depthwise convolutions: one input channel per group."""
    convolutions = ((name, m) for name, m in bare(model).named_modules() if isinstance(m, nn.modules.conv._ConvNd))
    return {f"{name}.weight" for name, m in convolutions if m.groups == m.in_channels > 1}


def _decays(module: nn.Module, prefix: str, leaf: str, p: Tensor) -> bool:
    if p.dim() < 2:
        return False
    if isinstance(module, _LAYERS):
        return "weight" in leaf and "bias" not in leaf
    if any("norm" in kind.__name__.lower() for kind in type(module).__mro__):
        return False
    if isinstance(module, nn.Embedding):
        return not _POSITIONS.search(f"{prefix}.{leaf}")
    # A parameter of a module of the model's own: a vector in disguise (class token, layer scale), or known by its name.
    vector = sum(size > 1 for size in p.shape) < 2
    return not (vector or _POSITIONS.search(leaf) or _LOOSE.search(leaf))


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as `<parameter>.<key>`: CPU tensors, contiguous, sharing no memory with the live ones.

    Counters are 0-dim. Learning rate and constants are not in it: they follow from the config and the step.
    """
    return _state_of(optimizer, _own_parameters(model, optimizer))


def _state_of(optimizer: torch.optim.Optimizer, named: Iterable[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name, p in named:
        for key, value in optimizer.state.get(p, {}).items():
            if isinstance(value, Tensor):
                state[f"{name}.{key}"] = torch.empty(value.shape, dtype=value.dtype).copy_(value.detach())
            elif value is not None:
                raise TypeError(f"optimizer state {name}.{key} is a {type(value).__name__}, not a tensor")
    return state


@torch.no_grad()
def load_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Tensor]) -> None:
    """Put back what `optimizer_state` returned, exactly, in the strides and on the devices the optimizer would use.

    Parameters without an entry start afresh. Raises UserError when it belongs to another model or optimizer.
    """
    _load_state(optimizer, dict(_own_parameters(model, optimizer)), state)


def _load_state(optimizer: torch.optim.Optimizer, owned: dict[str, nn.Parameter], state: dict[str, Tensor]) -> None:
    by_name: dict[str, dict[str, Tensor]] = {}
    for entry, value in state.items():
        name, _, key = entry.rpartition(".")
        by_name.setdefault(name, {})[key] = value
    for name, values in by_name.items():
        _check_state(optimizer, owned, name, values)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name, p in owned.items():
        for value in optimizer.state.get(p, {}).values():
            if isinstance(value, Tensor):
                value.zero_()
        for key, value in by_name.get(name, {}).items():
            optimizer.state[p][key] = _placed(p, key, value, groups[id(p)])


def _placed(p: Tensor, key: str, value: Tensor, group: dict[str, Any]) -> Tensor:
    """A copy of `value` where the optimizer keeps it: like its weight, or a counter beside the host's loop."""
    if key != "step":
        return torch.empty_like(p, dtype=value.dtype, requires_grad=False).copy_(value)
    on_device = group.get("fused") or group.get("capturable")
    return torch.empty((), dtype=value.dtype, device=p.device if on_device else "cpu").copy_(value)


def _check_state(
    optimizer: torch.optim.Optimizer, owned: dict[str, nn.Parameter], name: str, values: dict[str, Tensor]
) -> None:
    if name not in owned:
        raise UserError(f"optimizer state: {name!r} is not a parameter of this model{nearest(name, owned)}")
    known = next((keys for kind, keys in _STATE if isinstance(optimizer, kind)), set(values))
    if set(values) != known:
        kind = type(optimizer).__name__
        raise UserError(
            f"optimizer state of {name!r} holds {sorted(values)}, {kind} needs {sorted(known)}; set optimizer.name"
        )
    for key, value in values.items():
        shape = () if key == "step" else tuple(owned[name].shape)
        if tuple(value.shape) != shape:
            raise UserError(f"optimizer state: {name}.{key} has shape {tuple(value.shape)}, this model needs {shape}")


def _own_parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, nn.Parameter]]:
    """The optimizer's parameters with their bare names, in model order; ValueError when one is not the model's."""
    held = {id(p) for group in optimizer.param_groups if not group.get(_APART) for p in group["params"]}
    named = [(name, p) for name, p in bare(model).named_parameters() if id(p) in held]
    if len(named) != len(held):
        raise ValueError(f"{len(held) - len(named)} parameters of the optimizer are not the model's")
    return iter(named)


# Parameters that are not the model's ------------------------------------------------------------------------------


def add_apart(optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter]) -> None:
    """Train `named` too, in a group of their own with the optimizer's constants; `optimizer_state` leaves it out."""
    optimizer.add_param_group({"params": list(named.items()), _APART: True})
    group = optimizer.param_groups[-1]
    if isinstance(optimizer, torch.optim.SGD) and group.get("fused"):
        _still(optimizer, group)


def remove_apart(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> None:
    """Forget parameters given by `add_apart`, and their state."""
    gone = {id(p) for p in parameters}
    kept = [g for g in optimizer.param_groups if not (g.get(_APART) and {id(p) for p in g["params"]} <= gone)]
    optimizer.param_groups[:] = kept
    for p in parameters:
        optimizer.state.pop(p, None)


def apart_state(optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The state of parameters given by `add_apart`, as `optimizer_state` has it."""
    return _state_of(optimizer, named.items())


@torch.no_grad()
def load_apart_state(
    optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter], state: dict[str, Tensor]
) -> None:
    """Put back what `apart_state` returned. Raises UserError as `load_optimizer_state` does."""
    _load_state(optimizer, dict(named), state)
