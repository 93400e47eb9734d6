"""`python -m benchmarks.step`: what masks cost a training step, against the dense step and other ways to mask.

Forward, backward and optimizer on one batch that lies on the device, at the same sparsity and the same weights in every
arm: pruned weights are 0.0 in the dense step too and the learning rate is 0, for a matrix product's time depends on the
numbers in it. Peers, written here: the dense step; masks multiplied into the weights in the forward pass, as the
published harness has them; torch.nn.utils.prune. Costs are this process's CPU time, on a GPU wall time.

    python -m benchmarks.step
    python -m benchmarks.step --device cuda --model torchvision/resnet50 --size 224 --classes 1000 --batch 256
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import prune

from benchmarks import measure
from benchmarks.measure import Report
from benchmarks.published import multiply_in_forward
from utils import models, params, sparsity
from utils.masks import Masks, prunable_parameters
from utils.params.load import build as build_params
from utils.sparsity import Sparsity
from utils.system import memory
from utils.training import precision
from utils.training.masked_update import MaskedUpdate, Unfit
from utils.training.optimizers import build_optimizer
from utils.training.parallel import to_channels_last

OPTIMIZERS = {
    "SGD": {"optimizer.name": "sgd", "optimizer.lr": 0.1, "optimizer.momentum": 0.9, "optimizer.weight_decay": 5e-4},
    "AdamW": {"optimizer.name": "adamw", "optimizer.lr": 1e-3, "optimizer.weight_decay": 0.05},
}
ONE_PASS, HOOKS, LATE = "sieve, one pass", "sieve, gradient hooks", "sieve, masks after the backward pass"


@dataclass(frozen=True)
class Setting:
    """What all arms share. size: image side; dtype: of the forward pass."""

    model: str
    classes: int
    size: int
    batch: int
    density: float
    device: torch.device
    dtype: torch.dtype
    channels_last: bool = True


class Arm:
    """One way to train the masked network: call it for a step."""

    def __init__(self, setting: Setting, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.setting, self.model, self.optimizer = setting, model, optimizer
        self.batch = batch_of(setting)
        self.forward: Callable[[Tensor], Tensor] = model
        self.update: Callable[[], object] = optimizer.step
        self.held: Sparsity | None = None

    def __call__(self) -> Tensor:
        """One step; returns its loss."""
        images, labels = self.batch
        with precision.autocast(self.setting.device, self.setting.dtype):
            loss = functional.cross_entropy(self.forward(images).float(), labels)
        loss.backward()
        self.update()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def timed(self) -> None:
        """One step, waited for."""
        self()
        if self.setting.device.type == "cuda":
            torch.cuda.synchronize(self.setting.device)


@functools.lru_cache(maxsize=1)
def batch_of(setting: Setting) -> tuple[Tensor, Tensor]:
    """Random images, normalised as real ones are, and labels; the same for every arm."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(setting.batch, 3, setting.size, setting.size, generator=generator)
    labels = torch.randint(setting.classes, (setting.batch,), generator=generator)
    images = images.to(setting.device)
    if setting.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    return images, labels.to(setting.device)


def network(setting: Setting) -> tuple[nn.Module, Masks]:
    """The network with random masks, their weights at 0.0."""
    model = models.build(setting.model, setting.classes, image_size=setting.size)
    generator = torch.Generator().manual_seed(2)
    drawn = {
        n: torch.rand(p.shape, generator=generator) < setting.density for n, p in prunable_parameters(model).items()
    }
    masks = Masks(drawn)
    masks.apply_(model)
    model.to(setting.device)
    if setting.channels_last:
        to_channels_last(model)
    return model, masks


def optimizer_of(model: nn.Module, kind: str, lr: float | None, device: torch.device) -> torch.optim.Optimizer:
    """As the trainer builds it; `lr` in place of the usual rate."""
    section: params.Optimizer = build_params({"levels.count": 1, **OPTIMIZERS[kind]}).optimizer
    optimizer = build_optimizer(model, section, device)
    if lr is not None:
        for group in optimizer.param_groups:
            group["lr"] = lr
    return optimizer


def ours(setting: Setting, kind: str, lr: float | None = None, one_pass: bool = True) -> Arm:
    """The harness's own: masks within the optimizer's step, or with hooks on gradients and step; on a GPU all gradients
    are masked in one go when the backward pass is done. May raise Unfit.
    """
    model, masks = network(setting)
    arm = Arm(setting, model, optimizer_of(model, kind, lr, setting.device))
    arm.held = sparsity.attach(model, arm.optimizer, masks)
    if one_pass:
        arm.held.late_gradients(True)
        arm.update = MaskedUpdate(arm.optimizer, arm.held).step
    elif setting.device.type == "cuda":
        masked_late(arm)
    return arm


def masked_late(arm: Arm) -> None:
    """Mask the gradients of `arm` in one go before each step, as the trainer does on a GPU."""
    assert arm.held is not None
    mask, step = arm.held.mask_gradients, arm.optimizer.step
    arm.held.late_gradients(True)

    def update() -> None:
        mask()
        step()

    arm.update = update


def dense(setting: Setting, kind: str, lr: float | None = None, fused: bool = False) -> Arm:
    """No masks at all, weights zeroed beforehand. fused: torch's fused SGD, which the harness leaves alone on CPUs."""
    model, _ = network(setting)
    optimizer = optimizer_of(model, kind, lr, setting.device)
    if fused:
        group = {
            key: value for key, value in optimizer.param_groups[0].items() if key in ("lr", "momentum", "weight_decay")
        }
        optimizer = torch.optim.SGD(model.parameters(), **group, fused=True)
    return Arm(setting, model, optimizer)


def forward_product(setting: Setting, kind: str, lr: float | None = None) -> Arm:
    """weight * mask in every forward pass."""
    model, masks = network(setting)
    model = multiply_in_forward(model, masks)
    return Arm(setting, model, optimizer_of(model, kind, lr, setting.device))


def pruned_by_torch(setting: Setting, kind: str, lr: float | None = None) -> Arm:
    """torch.nn.utils.prune's forward hooks."""
    model, masks = network(setting)
    for name, mask in masks.items():
        prune.custom_from_mask(model.get_submodule(name.removesuffix(".weight")), "weight", mask.to(setting.device))
    return Arm(setting, model, optimizer_of(model, kind, lr, setting.device))


# Gates ------------------------------------------------------------------------------------------------------------


def leaks(arm: Arm, masks: Masks) -> int:
    """Pruned places, of weights and of optimizer state, whose bits are not those of +0.0."""
    count, parameters = 0, dict(arm.model.named_parameters())
    for name, mask in masks.items():
        p = parameters[name]
        for value in (p, *arm.optimizer.state[p].values()):
            if value is not None and value.shape == p.shape:
                bits = value.detach().cpu().contiguous().view(torch.int32)
                count += int((bits[~mask] != 0).sum())
    return count


def check(report: Report, setting: Setting, kind: str, make: Callable[[Setting, str], Arm], name: str) -> None:
    """Exact zeros in the setting that is timed; the trajectory of weight * mask in float32, contiguous, bit for bit."""
    arm = make(setting, kind)
    assert arm.held is not None
    for _ in range(3):
        arm()
    found = leaks(arm, arm.held.masks)
    report.gate(f"{kind}, {name}: pruned weights and optimizer state are 0.0", found == 0, f"{found} are not")
    plain = replace(setting, dtype=torch.float32, channels_last=False, batch=min(setting.batch, 4))
    arm, peer = make(plain, kind), forward_product(plain, kind)
    # Full float32 and one order of sums: AdamW's first step makes as much of a rounding difference as of a gradient.
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        losses = [(arm(), peer()) for _ in range(4)]
    apart, theirs = 0.0, dict(peer.model.named_parameters())
    assert arm.held is not None
    for name_of, p in arm.model.named_parameters():
        live = arm.held.masks[name_of].to(p.device) if name_of in arm.held.masks else torch.ones_like(p)
        found_apart = float(((p - theirs[name_of]) * live).detach().abs().max())
        apart = math.inf if math.isnan(found_apart) else max(apart, found_apart)
    exact = setting.device.type == "cpu"
    same = bool(losses[-1][0] == losses[-1][1]) and apart == 0 if exact else apart <= 1e-5
    report.gate(f"{kind}, {name}: trajectory of the weight * mask forward in float32", same, f"apart by {apart:g}")


# Figures ----------------------------------------------------------------------------------------------------------


def compare(report: Report, setting: Setting, kind: str, one_pass: bool, rounds: int) -> None:
    """The rows of one optimizer."""
    clock = time.process_time if setting.device.type == "cpu" else time.perf_counter
    label = f"{setting.model}, batch {setting.batch}, {str(setting.dtype).removeprefix('torch.')}, {kind}"
    name = ONE_PASS if one_pass else LATE if setting.device.type == "cuda" else HOOKS
    arm = ours(setting, kind, 0.0, one_pass)
    limit = "<= 1.00"
    if setting.device.type == "cuda":
        limit = "<= 1.01" if setting.model.startswith("cifar/") else "<= 1.005"
    peers: list[tuple[str, Callable[[], Arm], str]] = [
        ("dense, pre-zeroed", lambda: dense(setting, kind, 0.0), limit),
        ("weight * mask forward", lambda: forward_product(setting, kind, 0.0), "<= 0.94"),
        ("torch.nn.utils.prune", lambda: pruned_by_torch(setting, kind, 0.0), ""),
    ]
    if kind == "SGD" and setting.device.type == "cpu":
        peers.insert(1, ("dense, pre-zeroed, torch's fused SGD", lambda: dense(setting, kind, 0.0, True), ""))
    for peer, make, target in peers:
        pairs = measure.interleave(arm.timed, make().timed, rounds, warm_up=2, clock=clock)
        report.add(measure.cheaper(f"step, {label}", name, peer, pairs, target, "ms"))
    if one_pass:
        hooks, plain = ours(setting, kind, 0.0, one_pass=False), dense(setting, kind, 0.0)
        pairs = measure.interleave(hooks.timed, plain.timed, rounds, warm_up=2, clock=clock)
        report.add(measure.cheaper(f"step, {label}", HOOKS, "dense, pre-zeroed", pairs, "", "ms"))
        alone(report, label, arm, plain, rounds, clock)


def alone(report: Report, label: str, arm: Arm, peer: Arm, rounds: int, clock: measure.Clock) -> None:
    """The optimizer's step without forward and backward."""
    for one in (arm, peer):
        for p in one.model.parameters():
            p.grad = torch.randn_like(p)
    pairs = measure.interleave(lambda: _none(arm), lambda: _none(peer), rounds, clock=clock)
    report.add(measure.cheaper(f"optimizer and masks alone, {label}", ONE_PASS, "dense, pre-zeroed", pairs, "", "ms"))


def _none(arm: Arm) -> None:
    arm.update()


def main(arguments: list[str]) -> int:
    """Measure and write benchmarks/out/step.csv; 1 where a gate fails."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu (one thread) or cuda")
    parser.add_argument("--model", default="cifar/resnet18", help="network (default cifar/resnet18)")
    parser.add_argument("--classes", type=int, default=10, help="classes (default 10)")
    parser.add_argument("--size", type=int, default=32, help="image side (default 32)")
    parser.add_argument("--batch", type=int, default=32, help="images a step (default 32)")
    parser.add_argument("--density", type=float, default=0.1, help="share of weights kept (default 0.1)")
    parser.add_argument("--precision", default="bfloat16", help="of the forward pass (default bfloat16)")
    parser.add_argument("--rounds", type=int, default=21, help="pairs a row (default 21)")
    parser.add_argument("--out", type=Path, default=measure.OUT, help="where step.csv goes")
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
        memory.keep_freed()  # as in a process of the harness
    measure.settle(device)
    dtype = precision.choose(given.precision, device)
    setting = Setting(given.model, given.classes, given.size, given.batch, given.density, device, dtype)
    report = Report("step", out=given.out)
    one_pass = {}
    for kind in OPTIMIZERS:
        one_pass[kind] = fits(setting, kind)
        if one_pass[kind]:
            check(report, setting, kind, ours, ONE_PASS)
        check(report, setting, kind, functools.partial(ours, one_pass=False), LATE if device.type == "cuda" else HOOKS)
    for kind in OPTIMIZERS:
        compare(report, setting, kind, one_pass[kind], given.rounds)
    return report.finish()


def fits(setting: Setting, kind: str) -> bool:
    """Whether the harness takes the one pass here; prints why not."""
    try:
        ours(setting, kind)
    except Unfit as unfit:
        print(f"{kind}: masks take passes of their own: {unfit}", flush=True)
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
