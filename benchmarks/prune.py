"""`python -m benchmarks.prune`: what pruning at initialisation costs on cifar/resnet18.

SynFlow in 100 rounds: the pruning harness against the plain loop of the published code (scores end to end,
torch.kthvalue, a comparison), both on float64 passes; and that loop on float32 passes with this selection in it. Every
arm must end with the same masks. GraSP against SNIP on the same made-up images, and the memory of GraSP's micro-batches
against that of a training step. One thread; costs are CPU time.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
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

NETWORK, SHAPE = "cifar/resnet18", (3, 32, 32)
DENSITY = 0.05
Select = Callable[[Mapping[str, Tensor], Masks, int], dict[str, Tensor]]


# SynFlow -------------------------------------------------------------------------------------------------------------


def by_kthvalue(scores: Mapping[str, Tensor], masks: Masks, keep: int) -> dict[str, Tensor]:
    """The published selection: all scores end to end, the threshold below the `keep` highest, what exceeds it.

    Of scores that tie with the threshold it would keep none; here the seeded order of ties fills up what is missing.
    """
    flat = torch.cat([score.flatten() for score in scores.values()])
    threshold = torch.kthvalue(flat, len(flat) - keep).values
    found = {name: score > threshold for name, score in scores.items()}
    if missing := keep - sum(int(mask.count_nonzero()) for mask in found.values()):
        tied = {name: (score == threshold) & masks[name] for name, score in scores.items()}
        more = top(Pool(tuple(layers_of(scores, tied, 0)), missing))
        found = {name: mask | more[name] for name, mask in found.items()}
    return found


def by_sieve(scores: Mapping[str, Tensor], masks: Masks, keep: int) -> dict[str, Tensor]:
    """This selection."""
    return top(Pool(tuple(layers_of(scores, masks, 0)), keep))


def loop(model: nn.Module, rounds: int, select: Select, dtype: torch.dtype) -> Masks:
    """SynFlow as a plain loop: |w| m in place, no biases, no norms, an image of ones, backward, |w grad|, select."""
    masks = Masks.dense(model)
    net = copy.deepcopy(model).to(dtype).eval()
    for module in list(net.modules()):
        for key, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, key, nn.Identity())
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.abs_() if name in masks else parameter.zero_()
    found = {name: parameter for name, parameter in net.named_parameters() if name in masks}
    image = torch.ones(1, *SHAPE, dtype=dtype)
    for density in round_densities("exponential", 1.0, DENSITY, rounds):
        net.zero_grad()
        net(image).sum().backward()
        scores = {name: (weight.grad * weight).abs_().detach() for name, weight in found.items()}  # type: ignore[operator]
        masks = Masks(select(scores, masks, kept_count(density, masks.total)))
        with torch.no_grad():
            for name, weight in found.items():
                weight.mul_(masks[name])
    return masks


def harness_masks(model: nn.Module, rounds: int) -> Masks:
    """SynFlow by the pruning harness."""
    section = Pruning(criterion="synflow", density=DENSITY, rounds=rounds)
    return PruningHarness(section, seed=0, input_shape=SHAPE).prune(model, None, DENSITY).masks


def compare_synflow(report: Report, model: nn.Module, rounds: int, pairs: int) -> None:
    """Both precisions; the masks of every run are held against the peer's."""
    arms: dict[str, tuple[Callable[[], Masks], torch.dtype, str]] = {
        f"SynFlow, {rounds} rounds, float64": (lambda: harness_masks(model, rounds), torch.float64, ">= 1.8"),
        f"SynFlow, {rounds} rounds, float32 loop": (
            lambda: loop(model, rounds, by_sieve, torch.float32), torch.float32, ">= 2.4",
        ),
    }  # fmt: skip
    for name, (work, dtype, target) in arms.items():
        digests: list[str] = []

        def run(work: Callable[[], Masks], digests: list[str] = digests) -> float:
            start = time.process_time()
            masks = work()
            seconds = time.process_time() - start
            digests.append(masks.digest)
            return seconds

        found = measure.interleave(
            lambda work=work: run(work),  # type: ignore[misc]
            lambda dtype=dtype: run(lambda: loop(model, rounds, by_kthvalue, dtype)),  # type: ignore[misc]
            pairs,
            warm_up=0,
        )
        report.gate(f"{name}: the same masks as by kthvalue", len(set(digests)) == 1, digests[0][:16])
        arm = "sieve, pruning harness" if dtype == torch.float64 else "sieve's selection"
        report.add(measure.quicker(name, arm, "torch.kthvalue", found, target, unit="s"))


# GraSP ---------------------------------------------------------------------------------------------------------------


def images(batch: int, count: int) -> list[tuple[Tensor, Tensor]]:
    """Scoring batches of noise: no time depends on what the images show."""
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(batch, *SHAPE, generator=generator), torch.randint(10, (batch,), generator=generator))
        for _ in range(count)
    ]


def compare_grasp(report: Report, model: nn.Module, batch: int, pairs: int) -> None:
    """The time of scoring on two micro-batches, as GraSP's two halves; then memory."""
    masks, batches = Masks.dense(model), images(batch, 2)
    grasp, snip = (PruningHarness(Pruning(criterion=name), seed=0, input_shape=SHAPE) for name in ("grasp", "snip"))

    def run(harness: PruningHarness) -> float:
        start = time.process_time()
        harness.score(model, masks, batches)
        return time.process_time() - start

    wrong = hessian_error(model.to(torch.float64), images(2, 2))
    model.to(torch.float32)
    report.gate("GraSP is exact: a finite difference of the gradient agrees", wrong < 1e-4, f"{wrong:.1e} off")
    found = measure.interleave(lambda: run(grasp), lambda: run(snip), pairs)
    report.add(measure.cheaper(f"scoring, 2 x {batch} images", "GraSP", "SNIP", found, "<= 4.0"))
    step = peak_bytes(lambda: train(copy.deepcopy(model), images(2 * batch, 1)[0]))
    for size, target in ((2 * batch, ""), (batch, "<= 1.5")):
        ours = peak_bytes(lambda size=size: grasp.score(model, masks, images(size, 2)))  # type: ignore[misc]
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


def peak_bytes(work: Callable[[], object]) -> int:
    """The most bytes of tensors that `work` has alive at once, of what it makes and views."""
    with _Alive() as alive:
        work()
    return alive.peak


def main(arguments: list[str]) -> int:
    """Measure and write benchmarks/out/prune.csv; 1 where a gate fails."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prune", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=100, help="SynFlow's rounds (default 100)")
    parser.add_argument("--pairs", type=int, default=3, help="pairs of whole SynFlow prunings (default 3)")
    parser.add_argument("--batch", type=int, default=64, help="images of a micro-batch (default 64)")
    parser.add_argument("--grasp-pairs", type=int, default=7, help="pairs of GraSP and SNIP (default 7)")
    parser.add_argument("--out", type=Path, default=measure.OUT, help="where prune.csv goes")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = models.build(NETWORK, 10, image_size=None)
    report = Report("prune", ("torchvision",), given.out)
    compare_grasp(report, model, given.batch, given.grasp_pairs)
    compare_synflow(report, model, given.rounds, given.pairs)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
