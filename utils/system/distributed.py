"""The process group: who we are, collectives in few words, and a start and stop that always match."""

from __future__ import annotations

import datetime
import gc
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from utils.system.errors import Busy, UserError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process's place among all, as torchrun's environment tells it (one process without torchrun)."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def main(self) -> bool:
        """True on the one process that writes files and prints."""
        return self.rank == 0


def world() -> World:
    """Read torchrun's environment variables."""
    if not _launched():
        return World()
    env = os.environ
    return World(
        int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0)), int(env.get("LOCAL_WORLD_SIZE", 1))
    )


def _launched() -> bool:
    # MASTER_ADDR alone says nothing: batch systems export it for all.
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def choose_device(choice: str, place: World) -> torch.device:
    """`auto`, `cpu` or `cuda` to a device; a GPU is the one of the local rank. Raises UserError when there is none."""
    if choice == "cpu" or (choice == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if place.local_rank >= torch.cuda.device_count():
        raise UserError(
            f"run.device={choice}: local rank {place.local_rank} has no GPU ({torch.cuda.device_count()} visible); "
            "start fewer processes per node or set run.device=cpu"
        )
    device = torch.device("cuda", place.local_rank)
    torch.cuda.set_device(device)
    return device


def start(place: World, device: torch.device, backend: str = "auto", timeout: float = 600.0) -> None:
    """Join the process group torchrun set up; nothing to do for one process without torchrun."""
    if not _launched():
        return
    if backend == "auto":
        backend = "nccl" if device.type == "cuda" else "gloo"
    if backend == "nccl" and device.type != "cuda":
        raise UserError("distributed.backend=nccl needs GPUs; set distributed.backend=gloo")
    options: dict[str, Any] = {"device_id": device} if backend == "nccl" else {}
    limit = datetime.timedelta(seconds=timeout)
    if (restarts := _restarts()) > 0:
        store = next(iter(rendezvous("env://", timeout=limit)))[0]
        options |= {"store": dist.PrefixStore(f"restart {restarts}", store), "rank": place.rank}
        options |= {"world_size": place.size}
    dist.init_process_group(backend, timeout=limit, **options)


def _restarts() -> int:
    """How often torchrun has started these workers again, where that gives the new group a store of its own.

    torchrun keeps one store over its restarts, and what ranks that are gone left in it sends the new ones to closed
    ports. Only on one node do all ranks know the same number of restarts.
    """
    count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return int(count) if count.isdecimal() and os.environ.get("GROUP_WORLD_SIZE") == "1" else 0


def side_group(timeout: float = 600.0) -> dist.ProcessGroup | None:
    """A new group of all ranks over gloo, for small CPU tensors that no device must wait for; None for one process.

    timeout: seconds a collective of it may wait for another rank.
    """
    if not active() or dist.get_world_size() == 1:
        return None
    group: Any = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout))
    return None if isinstance(group, int) else group


def stop() -> None:
    """Leave the process group, if in one. Drop every DDP module first.

    gloo's threads live as long as anything holds the group; one of them that meets the interpreter's finalization
    aborts the process, after all its work was done.
    """
    if active():
        gc.collect()  # a DDP module in a cycle holds the group too
        dist.destroy_process_group()


def active() -> bool:
    """True between `start` and `stop` of a group."""
    return dist.is_available() and dist.is_initialized()


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Sum in place over all ranks; returns the tensor."""
    if active():
        dist.all_reduce(tensor)
    return tensor


def mean_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Average in place over all ranks; returns the tensor."""
    if active():
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor


def broadcast(tensor: torch.Tensor) -> torch.Tensor:
    """Rank 0's values on every rank, in place where `tensor` is contiguous; returns the tensor."""
    if active():
        tensor = tensor.contiguous()
        dist.broadcast(tensor, src=0)
    return tensor


def gather(value: T) -> list[T]:
    """Every rank's `value` (any small picklable object of our own making), by rank."""
    if not active():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def from_main(make: Callable[[], T]) -> T:
    """Run `make` on rank 0 and hand its value to all ranks. An error there is raised on every rank."""
    if not active():
        return make()
    box: list[Any] = [None, None]
    failure: Exception | None = None
    if dist.get_rank() == 0:
        try:
            box[0] = make()
        except Exception as error:  # its text goes to every rank, for not every exception can be pickled
            kind = next((known for known in (Busy, UserError) if isinstance(error, known)), None)
            failure, box[1] = error, (kind, f"{error}" or type(error).__name__)
    dist.broadcast_object_list(box, src=0)
    if failure is not None:
        raise failure
    if box[1] is not None:
        kind, text = box[1]
        raise RuntimeError(f"rank 0 failed: {text}") if kind is None else kind(text)
    value: T = box[0]
    return value


def exists(path: Path) -> bool:
    """Whether rank 0 sees `path`: it looks for all, so that no rank takes another way than the rest."""
    return from_main(path.exists)


def barrier() -> None:
    """Wait for all ranks."""
    if active():
        dist.barrier()


def agree(what: str, digest: str | Callable[[], str]) -> None:
    """Raise RuntimeError on every rank unless all hold the same digest of `what`; made only where there are ranks."""
    if not active():
        return
    digests = gather(digest if isinstance(digest, str) else digest())
    if len(set(digests)) > 1:
        table = ", ".join(f"rank {rank}: {value[:12]}" for rank, value in enumerate(digests))
        raise RuntimeError(f"{what} differ between ranks ({table})")
