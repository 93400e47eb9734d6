"""The arms of `benchmarks.matrix`: one training step in several ways to mask it, eager, compiled, as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.step import Arm, Setting, dense, fits, forward_product, network, optimizer_of, ours
from utils import sparsity

DENSE, PRODUCT = "dense, pre-zeroed", "weight * mask forward"
FOREACH, SIEVE, COMPILED = "foreach passes", "sieve", "one pass per weight, compiled"
EAGER, COMPILE, GRAPH = "eager", "compile", "compile + CUDA graph"
_KIND = "SGD"
_WARM_UPS = 3


def held(setting: Setting) -> Arm:
    """The harness's own: in one pass where it takes that, on a GPU torch's fused SGD, and masks before and after it."""
    return ours(setting, _KIND, 0.0, one_pass=setting.device.type == "cpu" and fits(setting, _KIND))


def foreach(setting: Setting, lr: float = 0.0) -> Arm:
    """torch's SGD that loops over lists, gradients masked in one go before it and weights after it."""
    model, masks = network(setting)
    group = optimizer_of(model, _KIND, lr, setting.device).param_groups[0]
    rule = {key: group[key] for key in ("lr", "momentum", "weight_decay")}
    optimizer = torch.optim.SGD(model.parameters(), **rule, foreach=True)
    arm = Arm(setting, model, optimizer)
    arm.held = sparsity.attach(model, optimizer, masks)
    arm.held.late_gradients(True)
    mask, step = arm.held.mask_gradients, optimizer.step

    def update() -> None:
        mask()
        step()

    arm.update = update
    return arm


def compiled_pass(setting: Setting, lr: float = 0.0, compiler: Callable[..., Callable[..., None]] | None = None) -> Arm:
    """SGD and the masks written as one loop over the weights, which `compiler` (torch.compile) fuses."""
    arm = foreach(setting, lr)
    assert arm.held is not None
    group, state = arm.optimizer.param_groups[0], arm.optimizer.state
    weights = list(group["params"])
    momenta = [torch.zeros_like(p, requires_grad=False) for p in weights]
    for p, momentum in zip(weights, momenta, strict=True):
        state[p]["momentum_buffer"] = momentum
    masks = {id(p): arm.held.live(name) != 0 for name, p in arm.held.parameters.items()}
    live = [masks.get(id(p)) for p in weights]
    rule = (compiler or compiled)(masked_sgd_)
    rate = torch.tensor(lr, device=setting.device)  # not a number, for another one of which all is compiled again

    def update() -> None:
        with torch.no_grad():
            rule(weights, [p.grad for p in weights], momenta, live, rate, group["momentum"], group["weight_decay"])

    arm.update = update
    return arm


def masked_sgd_(
    weights: Sequence[Tensor], grads: Sequence[Tensor], momenta: Sequence[Tensor], masks: Sequence[Tensor | None],
    rate: Tensor, momentum: float, decay: float,
) -> None:  # fmt: skip
    """One step of SGD with momentum and weight decay, in place; weights and momenta stay 0.0 where a mask is False."""
    for p, grad, buffer, mask in zip(weights, grads, momenta, masks, strict=True):
        moved = buffer * momentum + (grad + p * decay)
        if mask is not None:
            moved = torch.where(mask, moved, 0.0)
        buffer.copy_(moved)
        p.sub_(rate * moved)


def compiled(work: Callable[..., Any]) -> Callable[..., Any]:
    """`work` by torch.compile, for each size anew: networks that share a forward method, met one after the other, would
    else be compiled for any size, and Inductor then leaves the layout as it is.
    """
    return torch.compile(work, dynamic=False)


def arms_of(setting: Setting, mode: str) -> dict[str, Arm]:
    """All ways to mask in one mode, by name; on a CPU without the compiled pass, for the harness has a native one."""
    arms = {
        DENSE: dense(setting, _KIND, 0.0),
        PRODUCT: forward_product(setting, _KIND, 0.0),
        FOREACH: foreach(setting),
        SIEVE: held(setting),
    }
    if setting.device.type == "cuda":
        arms[COMPILED] = compiled_pass(setting)
    if mode != EAGER:
        for arm in arms.values():
            arm.forward = compiled(arm.model)
    return arms


def ready(arms: dict[str, Arm], mode: str) -> dict[str, Callable[[], object]]:
    """A step of each arm, ready to be timed: all were warmed up, and in GRAPH mode captured after that.

    The graphs of a cell share their memory: no two of them run at once and none leaves anything in it.
    """
    if mode != GRAPH:
        _warm_up(arms)
        return dict(arms)
    device = arms[DENSE].setting.device
    side, here = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    side.wait_stream(here)
    with torch.cuda.stream(side):  # what is made once, as momenta and cuDNN's choices, must not be captured
        _warm_up(arms)
    here.wait_stream(side)
    pool = torch.cuda.graph_pool_handle()
    return {name: _captured(arm, pool, side) for name, arm in arms.items()}


def _warm_up(arms: dict[str, Arm]) -> None:
    for arm in arms.values():
        for _ in range(_WARM_UPS):
            arm()


def _captured(arm: Arm, pool: Any, side: torch.cuda.Stream) -> Callable[[], object]:
    """The whole step as one CUDA graph: forward and backward pass, masks, optimizer."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=side):
        arm()
    return graph.replay


def in_turn(
    steps: dict[str, Callable[[], object]], count: int, rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of `count` steps of each, `rounds` times; every round begins with another one."""
    costs: dict[str, list[float]] = {name: [] for name in steps}
    order, clock = list(steps), measure.clock(device)
    for _ in range(rounds):
        for name in order:
            measure.wait(device)
            costs[name].append(measure.cost(lambda step=steps[name]: _repeat(step, count, device), clock))  # type: ignore[misc]
        order = order[1:] + order[:1]
    return costs


def _repeat(step: Callable[[], object], count: int, device: torch.device) -> None:
    for _ in range(count):
        step()
    measure.wait(device)


def momentum_norm(arm: Arm) -> float:
    """Euclidean norm of all momenta."""
    return sum(float(value.norm()) ** 2 for value in _momenta(arm).values()) ** 0.5


def momentum_apart(arms: dict[str, Arm]) -> float:
    """Largest distance, over the arms, of the momenta of kept weights from the dense step's, as a share of their norm.

    After as many steps at learning rate 0 they are the same but for the order of sums.
    """
    first = _momenta(arms[DENSE])
    shares = []
    _, masks = network(arms[DENSE].setting)
    whole = sum(float(value[_live(masks, name, value)].norm()) ** 2 for name, value in first.items()) ** 0.5
    for arm in arms.values():
        apart = 0.0
        for name, value in _momenta(arm).items():
            live = _live(masks, name, value)
            apart += float((value - first[name])[live].norm()) ** 2
        shares.append(apart**0.5 / whole)
    return float(torch.tensor(shares).max())  # NaN if one is, which Python's max is not


def _live(masks: sparsity.Masks, name: str, value: Tensor) -> Tensor:
    return masks[name].to(value.device) if name in masks else torch.ones_like(value, dtype=torch.bool)


def _momenta(arm: Arm) -> dict[str, Tensor]:
    named = arm.model.named_parameters()
    return {name: arm.optimizer.state[p]["momentum_buffer"] for name, p in named}
