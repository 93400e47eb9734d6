"""`python -m benchmarks.prune`: what pruning at initialisation costs, on cifar/resnet18 or another network.

SynFlow in 100 rounds: the pruning harness against the plain loop of the published code (scores end to end,
torch.kthvalue, a comparison), both on float64 passes; and that loop on float32 passes with this selection in it. Every
arm must end with the same masks. GraSP against SNIP on the same made-up images, and the memory of GraSP's micro-batches
against that of a training step. One thread; costs are CPU time, on a GPU wall time, and there SynFlow's seconds too.

    python -m benchmarks.prune
    python -m benchmarks.prune --device cuda --model torchvision/resnet50 --size 224 --classes 1000
"""

from __future__ import annotations

import argparse
import copy
import functools
import sys
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import measure
from benchmarks.measure import Report
from utils import models
from utils.masks import Masks
from utils.params.pruning import Pruning
from utils.pruning.harness import PruningHarness
from utils.pruning.rounds import round_densities
from utils.pruning.select import Pool, kept_count, layers_of, top
from utils.system import memory

NETWORK, SHAPE = "cifar/resnet18", (3, 32, 32)
DENSITY = 0.05
APART = 1e-4
"""Share of the weights in which two arms' masks may differ on a GPU, whose sums have no fixed order; none on a CPU."""
SECONDS = {("torchvision/resnet50", 224, 100): "<= 2.5"}
"""What SynFlow may take on a GPU, by model, image side and rounds."""
Shape = tuple[int, int, int]
Select = Callable[[Mapping[str, Tensor], Mapping[str, Tensor], int], dict[str, Tensor]]


# SynFlow -------------------------------------------------------------------------------------------------------------


def by_kthvalue(scores: Mapping[str, Tensor], masks: Mapping[str, Tensor], keep: int) -> dict[str, Tensor]:
    """The published selection: all scores end to end, the threshold below the `keep` highest, what exceeds it.

    Of scores that tie with the threshold it would keep none; here the seeded order of ties fills up what is missing.
    """
    flat = torch.cat([score.flatten() for score in scores.values()])
    threshold = torch.kthvalue(flat, len(flat) - keep).values
    found = {name: score > threshold for name, score in scores.items()}
    if missing := keep - sum(int(mask.count_nonzero()) for mask in found.values()):
        tied = {name: (score == threshold).cpu() & masks[name].cpu() for name, score in scores.items()}
        more = top(Pool(tuple(layers_of(scores, tied, 0)), missing))
        found = {name: mask | more[name].to(mask.device) for name, mask in found.items()}
    return found


def by_sieve(scores: Mapping[str, Tensor], masks: Mapping[str, Tensor], keep: int) -> dict[str, Tensor]:
    """This selection."""
    live = masks if isinstance(masks, Masks) else Masks(masks)
    return top(Pool(tuple(layers_of(scores, live, 0)), keep))


def loop(model: nn.Module, rounds: int, select: Select, dtype: torch.dtype, shape: Shape = SHAPE) -> Masks:
    """SynFlow as a plain loop: |w| m in place, no biases, no norms, an image of ones, backward, |w grad|, select."""
    masks = Masks.dense(model)
    live: Mapping[str, Tensor] = masks
    net, found = positive(model, dtype, masks)
    image = torch.ones(1, *shape, dtype=dtype, device=device_of(model))
    for density in round_densities("exponential", 1.0, DENSITY, rounds):
        net.zero_grad()
        net(image).sum().backward()
        scores = {name: (weight.grad * weight).abs_().detach() for name, weight in found.items()}  # type: ignore[operator]
        chosen = select(scores, live, kept_count(density, masks.total))
        # On a GPU the published code's masks stay there: no copy of each round's may slow the peer down.
        live = Masks(chosen) if image.device.type == "cpu" else chosen
        with torch.no_grad():
            for name, weight in found.items():
                weight.mul_(live[name].to(weight.device))
    return Masks(live)


def positive(model: nn.Module, dtype: torch.dtype, masks: Masks) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """SynFlow's network: a copy of `model` with |w|, no biases, no norms; and its prunable parameters."""
    net = copy.deepcopy(model).to(dtype).eval()
    for module in list(net.modules()):
        for key, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, key, nn.Identity())
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.abs_() if name in masks else parameter.zero_()
    return net, {name: parameter for name, parameter in net.named_parameters() if name in masks}


def flows(model: nn.Module, dtype: torch.dtype, shape: Shape = SHAPE) -> bool:
    """Whether `dtype` holds the sum of the outputs that SynFlow starts with; that of deep networks exceeds float32."""
    net, _ = positive(model, dtype, Masks.dense(model))
    with torch.no_grad():
        return bool(net(torch.ones(1, *shape, dtype=dtype, device=device_of(model))).sum().isfinite())


def device_of(model: nn.Module) -> torch.device:
    """Where the model lies."""
    return next(model.parameters()).device


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of `work`: of this process's CPUs, on a GPU by the wall clock."""

    def whole() -> None:
        work()
        measure.wait(device)

    return measure.cost(whole, measure.clock(device))


def harness_masks(model: nn.Module, rounds: int, shape: Shape = SHAPE) -> Masks:
    """SynFlow by the pruning harness."""
    section = Pruning(criterion="synflow", density=DENSITY, rounds=rounds)
    return PruningHarness(section, seed=0, input_shape=shape).prune(model, None, DENSITY).masks


def compare_synflow(
    report: Report, model: nn.Module, rounds: int, pairs: int, shape: Shape = SHAPE, limit: str = ""
) -> None:
    """Both precisions; the masks of every run are held against the peer's. limit: of the seconds on a GPU."""
    device = device_of(model)
    arms: dict[str, tuple[Callable[[], Masks], torch.dtype, str]] = {
        f"SynFlow, {rounds} rounds, float64": (lambda: harness_masks(model, rounds, shape), torch.float64, ">= 1.8"),
        f"SynFlow, {rounds} rounds, float32 loop": (
            lambda: loop(model, rounds, by_sieve, torch.float32, shape), torch.float32, ">= 2.4",
        ),
    }  # fmt: skip
    for name, (work, dtype, target) in arms.items():
        if not flows(model, dtype, shape):
            print(f"{name}: left out, the network's flow exceeds {dtype}", flush=True)
            continue
        made: list[Masks] = []

        def run(work: Callable[[], Masks], made: list[Masks] = made) -> float:
            return timed(lambda: made.append(work()), device)

        found = measure.interleave(
            lambda work=work: run(work),  # type: ignore[misc]
            lambda dtype=dtype: run(lambda: loop(model, rounds, by_kthvalue, dtype, shape)),  # type: ignore[misc]
            pairs,
            warm_up=0 if device.type == "cpu" else 1,
        )
        apart = max(differing(made[0], masks) for masks in made[1:])
        allowed = 0 if device.type == "cpu" else int(APART * made[0].total)
        report.gate(f"{name}: the same masks as by kthvalue", apart <= allowed, f"{apart} of {made[0].total} differ")
        arm = "sieve, pruning harness" if dtype == torch.float64 else "sieve's selection"
        row = report.add(measure.quicker(name, arm, "torch.kthvalue", found, target, unit="s"))
        if dtype == torch.float64 and device.type == "cuda":
            add_seconds(report, name, arm, row, limit)


def add_seconds(report: Report, name: str, arm: str, row: measure.Row, limit: str) -> None:
    """The arm's own seconds in a comparison's `row`, against a limit."""
    assert row.arm_value is not None
    report.add(measure.figure(f"{name}: seconds", arm, row.arm_value, "s", limit))


def differing(one: Masks, other: Masks) -> int:
    """Weights that live in one of the masks alone."""
    return sum(int((one[name] != other[name]).sum()) for name, _ in zip(one, other, strict=True))


# GraSP ---------------------------------------------------------------------------------------------------------------


def images(
    batch: int, count: int, shape: Shape = SHAPE, device: torch.device | None = None
) -> list[tuple[Tensor, Tensor]]:
    """Scoring batches of noise, of 10 classes: no time depends on what the images show."""
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(batch, *shape, generator=generator).to(device),
            torch.randint(10, (batch,), generator=generator).to(device),
        )
        for _ in range(count)
    ]


def check_grasp(report: Report, model: nn.Module) -> None:
    """The gate of GraSP, on small images: the more activations there are, the more a step carries over their kinks."""
    wrong = hessian_error(model.to(torch.float64), images(2, 2, SHAPE, device_of(model)))
    model.to(torch.float32)
    report.gate("GraSP is exact: a finite difference of the gradient agrees", wrong < 1e-4, f"{wrong:.1e} off")


def compare_grasp(report: Report, model: nn.Module, batch: int, pairs: int, shape: Shape = SHAPE) -> None:
    """The time of scoring on two micro-batches, as GraSP's two halves; then memory."""
    device = device_of(model)
    noise = functools.partial(images, shape=shape, device=device)
    masks, batches = Masks.dense(model), noise(batch, 2)
    grasp, snip = (PruningHarness(Pruning(criterion=name), seed=0, input_shape=shape) for name in ("grasp", "snip"))

    def run(harness: PruningHarness) -> float:
        return timed(lambda: harness.score(model, masks, batches), device)

    found = measure.interleave(lambda: run(grasp), lambda: run(snip), pairs)
    report.add(measure.cheaper(f"scoring, 2 x {batch} images", "GraSP", "SNIP", found, "<= 4.0"))

    def scored() -> nn.Module:
        # CUDA counts what work makes, not the weights it finds; on a CPU those are counted as they are viewed.
        return copy.deepcopy(model) if device.type == "cuda" else model

    step = peak_bytes(lambda: train(copy.deepcopy(model), noise(2 * batch, 1)[0]), device)
    for size, target in ((2 * batch, ""), (batch, "<= 1.5")):
        ours = peak_bytes(lambda size=size: grasp.score(scored(), masks, noise(size, 2)), device)  # type: ignore[misc]
        name = f"memory, micro-batches of {size} against a step of {2 * batch}"
        ratio = ours / step
        met = measure.meets(target, ratio)
        report.add(
            measure.Row(name, "GraSP", "training step", ratio, 0.0, target, met, ours / 1e6, step / 1e6, "MB", 1)
        )


def hessian_error(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> float:
    """Largest difference of H g and a central difference of the gradient along g, over its largest entry; eval mode.

    A step of 1e-9 hardly carries an activation over the kink of its ReLU, where the gradient jumps.
    """
    from utils.pruning.criteria._gradients import gradient_products, mean_gradients

    def loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return functional.cross_entropy(net(batch[0].double()), batch[1])

    model, masks = copy.deepcopy(model).eval(), Masks.dense(model)
    products = gradient_products(model, masks, batches, loss)
    along = mean_gradients(model, masks, batches, loss)
    weights = {name: p for name, p in model.named_parameters() if name in masks}
    scale = 1e-9 / max(float(g.abs().max()) for g in along.values())
    ends = []
    for sign in (2.0, -4.0):  # from the weights to + and then to -
        with torch.no_grad():
            for name, weight in weights.items():
                weight.add_(along[name], alpha=sign / 2 * scale)
        ends.append(mean_gradients(model, masks, batches, loss))
    worst = max(float(((ends[0][n] - ends[1][n]) / (2 * scale) - products[n]).abs().max()) for n in masks)
    return worst / max(float(p.abs().max()) for p in products.values())


def train(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    """A training step with momentum, as memory has it: weights, gradients, momentum and activations."""
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):  # the first makes the momentum
        optimizer.zero_grad()
        functional.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()


class _Alive(TorchDispatchMode):
    """Bytes of the tensor storages that operations within it made and that still live."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in self.sizes:
                storage = leaf.untyped_storage()
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, storage._cdata)
        return out

    def _gone(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


def peak_bytes(work: Callable[[], object], device: torch.device | None = None) -> int:
    """The most bytes of tensors that `work` has alive at once: of what it makes and views, on a GPU what it makes."""
    if device is not None and device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with _Alive() as alive:
        work()
    return alive.peak


def main(arguments: list[str]) -> int:
    """Measure and write benchmarks/out/prune.csv; 1 where a gate fails."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prune", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu (one thread) or cuda")
    parser.add_argument("--model", default=NETWORK, help=f"network (default {NETWORK})")
    parser.add_argument("--classes", type=int, default=10, help="classes, at least 10 (default 10)")
    parser.add_argument("--size", type=int, default=SHAPE[1], help=f"image side (default {SHAPE[1]})")
    parser.add_argument("--rounds", type=int, default=100, help="SynFlow's rounds (default 100)")
    parser.add_argument("--pairs", type=int, default=3, help="pairs of whole SynFlow prunings (default 3)")
    parser.add_argument("--batch", type=int, default=64, help="images of a micro-batch (default 64)")
    parser.add_argument("--grasp-pairs", type=int, default=7, help="pairs of GraSP and SNIP (default 7)")
    parser.add_argument("--out", type=Path, default=measure.OUT, help="where prune.csv goes")
    given = parser.parse_args(arguments)
    device, shape = torch.device(given.device), (3, given.size, given.size)
    torch.set_num_threads(1)
    if device.type == "cuda":
        torch.backends.cudnn.deterministic = True  # two arms of the same passes shall get the same scores
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    model = models.build(given.model, given.classes, image_size=given.size).to(device)
    report = Report("prune", ("torchvision",), given.out)
    check_grasp(report, model)
    # SynFlow comes first: GraSP's large blocks leave the C library's allocator in another state (freed blocks of their
    # size stay with the process from then on), which speeds up the plain loop, whose blocks come and go every round.
    limit = SECONDS.get((given.model, given.size, given.rounds), "")
    compare_synflow(report, model, given.rounds, given.pairs, shape, limit)
    if device.type == "cpu":
        memory.keep_freed()  # as in a process of the harness
    compare_grasp(report, model, given.batch, given.grasp_pairs, shape)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
