"""Sending only what is kept: a communication hook of DistributedDataParallel that packs each gradient bucket.

A bucket's kept entries, and those of norms, biases and all else no mask covers, are gathered into one short tensor,
summed over the ranks, and put back; places of pruned weights are +0.0. The result is DDP's up to the order of sums, and
on two ranks its bits. What is packed follows from the masks alone, so all ranks pack alike.

Packing costs time for every kept entry and saves link time for every pruned one. Where ranks share a machine, or the
link is fast, it does not pay: `choose` knows, and `distributed.packed_below` is the density up to which a bucket is
packed (measured by `python -m benchmarks.allreduce`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils import params
from utils.sparsity import Sparsity
from utils.system.distributed import World, active, agree


def choose(section: params.Distributed, place: World, device: torch.device) -> str:
    """`dense` or `packed`: what `distributed.reduction` comes to; the same on every rank.

    auto: packed where the ranks are CPUs of several nodes, dense on one node and on GPUs, whose links are faster than
    those packing was measured on.
    """
    if section.reduction != "auto":
        return section.reduction
    several_nodes = place.size > place.local_size
    return "packed" if several_nodes and device.type == "cpu" and section.backend != "nccl" else "dense"


def install(
    wrapped: nn.Module, section: params.Distributed, place: World, device: torch.device
) -> PackedReduction | None:
    """Register the hook on a DDP module that has seen no backward pass; None, and DDP as it is, where `dense`.

    Without masks to `follow` it reduces densely. Raises RuntimeError unless all ranks choose the same.
    """
    if not active() or place.size == 1:
        return None
    choice = choose(section, place, device)
    agree("distributed.reduction", f"{choice} {section.packed_below}")
    if choice == "dense":
        return None
    assert isinstance(wrapped, nn.parallel.DistributedDataParallel)
    made = PackedReduction(place.size, section.packed_below)
    wrapped.register_comm_hook(made, lambda state, bucket: state.reduce(bucket))
    return made


@dataclass
class _Plan:
    """How one bucket goes: `key` says of which parameters and masks; no `index` means as a whole."""

    key: tuple[Any, ...]
    index: Tensor | None = None
    packed: Tensor | None = None


class PackedReduction:
    """The hook's state: the masks it follows and, per bucket, which entries go. Made by `install`.

    sent: gradient entries handed to all-reduce since it was made
    """

    def __init__(self, ranks: int, packed_below: float) -> None:
        """packed_below: buckets with a larger share of entries to send go as a whole."""
        self.sent = 0
        self._ranks, self._below = ranks, packed_below
        self._sparsity: Sparsity | None = None
        self._plans: dict[int, _Plan] = {}

    def follow(self, sparsity: Sparsity | None) -> None:
        """Pack by the masks `sparsity` enforces, as they change; None: reduce densely. On all ranks alike."""
        self._sparsity = sparsity
        self._plans.clear()

    def reduce(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """The bucket averaged over all ranks, in its own buffer."""
        buffer = bucket.buffer()
        plan = self._plan(bucket, buffer)
        index = plan.index
        packed = buffer if index is None else torch.index_select(buffer, 0, index, out=plan.packed)
        # Divided before the sum, and by multiplication, as DDP does without a hook.
        packed.mul_(1.0 / self._ranks)
        self.sent += packed.numel()
        # A CPU clears the bucket while the link is busy. A GPU has to before: unpacking there waits for the sum alone.
        early = index is not None and buffer.is_cuda
        if early:
            buffer.zero_()
        work: Any = dist.all_reduce(packed, async_op=True)
        if index is not None and not early:
            buffer.zero_()

        def unpack(done: torch.futures.Future[Any]) -> Tensor:
            done.value()  # raises what went wrong
            return buffer if index is None else buffer.index_copy_(0, index, packed)

        future: torch.futures.Future[Tensor] = work.get_future().then(unpack)
        return future

    def _plan(self, bucket: dist.GradBucket, buffer: Tensor) -> _Plan:
        sparsity, parameters = self._sparsity, bucket.parameters()
        if sparsity is None or sparsity.dense:
            return _Plan(())
        # DDP makes other buckets of the parameters after its first backward pass; numbers alone say nothing.
        key = (sparsity.version, buffer.numel(), buffer.dtype, *map(id, parameters))
        plan = self._plans.get(bucket.index())
        if plan is None or plan.key != key:
            plan = self._plans[bucket.index()] = self._made(key, sparsity, parameters, buffer)
        return plan

    def _made(self, key: tuple[Any, ...], sparsity: Sparsity, parameters: list[Tensor], buffer: Tensor) -> _Plan:
        if sum(p.numel() for p in parameters) != buffer.numel():
            raise RuntimeError("a gradient bucket holds other entries than its parameters'; set distributed.reduction")
        goes = torch.ones(buffer.numel(), dtype=torch.bool, device=buffer.device)
        offset = 0
        for p in parameters:
            kept = sparsity.stored(p)
            if kept is not None:
                goes[offset : offset + p.numel()] = kept
            offset += p.numel()
        index = goes.nonzero().flatten()
        if len(index) == len(goes) or len(index) > self._below * len(goes):
            return _Plan(key)
        return _Plan(key, index, buffer.new_empty(len(index)))
