"""What channels taken out save: a training step, inference and memory of networks shrunk to half of their MACs.

Every layer is thinned alike. Dense and shrunk networks take turns, step by step, so that what else the machine does
falls on both; times are medians, ratios medians of the ratios of neighbours. Writes shrink.csv and shrink.md.

    python -m benchmarks.shrink --out assets
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from torch.nn import functional

from utils import models
from utils.pruning.structured import Channels, Limits, shrink
from utils.system import atomic
from utils.training import precision
from utils.training.measure import peak_megabytes

NETWORKS = ("cifar/resnet18", "cifar/vgg16_bn")


def shrunk(name: str, keep: float, round_to: int) -> tuple[nn.Module, nn.Module, float]:
    """The dense network, the one with a share `keep` of its MACs, and the share reached."""
    dense = models.build(name, 10, image_size=32)
    channels = Channels.of(dense, (3, 32, 32), name=name)
    limits = Limits(round_to=round_to)
    chosen = channels.prune(dense, "l1", budget="macs", keep=keep, scope="layer", limits=limits)
    smaller = shrink(dense, channels.groups, chosen.mask)
    channels.check_cost(smaller, chosen.mask)
    return dense, smaller, chosen.reached / chosen.reference


def step_of(model: nn.Module, batch: int, device: torch.device, dtype: torch.dtype) -> Callable[[], None]:
    """One whole training step: forward, backward, SGD with momentum."""
    model = model.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, foreach=True)
    images = torch.randn(batch, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (batch,), device=device)

    def step() -> None:
        with precision.autocast(device, dtype):
            loss = functional.cross_entropy(model(images).float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def inference_of(model: nn.Module, batch: int, device: torch.device, dtype: torch.dtype) -> Callable[[], None]:
    """One forward pass in eval mode."""
    images = torch.randn(batch, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def infer() -> None:
        model.eval()
        with precision.autocast(device, dtype):
            model(images)

    return infer


def in_turns(works: Sequence[Callable[[], None]], repeats: int, device: torch.device) -> list[list[float]]:
    """Seconds of each, run one after the other `repeats` times."""
    times: list[list[float]] = [[] for _ in works]
    for number in range(repeats + 2):
        for work, found in zip(works, times, strict=True):
            _wait(device)
            begin = time.perf_counter()
            work()
            _wait(device)
            if number >= 2:  # the first ones choose kernels and allocate
                found.append(time.perf_counter() - begin)
    return times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def row(
    name: str, keep: float, round_to: int, batch: int, repeats: int, device: torch.device, dtype: torch.dtype
) -> dict:
    """One network on one device."""
    dense, smaller, share = shrunk(name, keep, round_to)
    networks = (dense, smaller)
    train = in_turns([step_of(net, batch, device, dtype) for net in networks], repeats, device)
    infer = in_turns([inference_of(net, batch, device, dtype) for net in networks], repeats, device)
    images = torch.randn(batch, 3, 32, 32, device=device)
    memory = [peak_megabytes(net.train(), images, dtype, 1) for net in networks]
    found: dict = {
        "network": name,
        "device": str(device),
        "precision": str(dtype).removeprefix("torch."),
        "batch": batch,
    }
    found |= {"round_to": round_to, "macs_share": share}
    for what, times in (("train", train), ("inference", infer)):
        found[f"{what}_ms_dense"], found[f"{what}_ms"] = (1e3 * statistics.median(t) for t in times)
        found[f"{what}_ratio"] = statistics.median(b / a for a, b in zip(*times, strict=True))
    found["memory_mb_dense"], found["memory_mb"] = memory
    return found


def table(frame: pd.DataFrame, head: str) -> str:
    """As markdown."""
    lines = [
        "| network | device | batch | MACs | training step ms | ratio | inference ms | ratio | memory MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for _, r in frame.iterrows():
        lines.append(
            f"| `{r.network}` | {r.device} {r.precision} | {r.batch} | {r.macs_share:.3f} | "
            f"{r.train_ms_dense:.1f} -> {r.train_ms:.1f} | {r.train_ratio:.2f} | "
            f"{r.inference_ms_dense:.1f} -> {r.inference_ms:.1f} | {r.inference_ratio:.2f} | "
            f"{r.memory_mb_dense:.0f} -> {r.memory_mb:.0f} |"
        )
    return f"{head}\n\n" + "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, then write the table; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shrink")
    parser.add_argument("--keep", type=float, default=0.5, help="share of the MACs that stays")
    parser.add_argument("--round-to", type=int, default=8, help="widths are multiples of this")
    parser.add_argument("--batch", type=int, help="images of a step (CPU 32, GPU 512)")
    parser.add_argument("--repeats", type=int, default=15, help="steps timed of each network")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out"), help="folder of the CSV and the table")
    args = parser.parse_args(argv)
    device, dtype = torch.device(args.device), getattr(torch, args.precision)
    batch = args.batch or (512 if device.type == "cuda" else 32)
    rows = [row(name, args.keep, args.round_to, batch, args.repeats, device, dtype) for name in NETWORKS]
    frame = pd.DataFrame(rows)
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    shown = " ".join(["python -m benchmarks.shrink", *(sys.argv[1:] if argv is None else argv)])
    text = table(frame, f"`{shown}`: {machine}, {torch.get_num_threads()} thread(s), torch {torch.__version__}")
    args.out.mkdir(parents=True, exist_ok=True)
    atomic.write_text(args.out / "shrink.csv", frame.to_csv(index=False, lineterminator="\n"))
    atomic.write_text(args.out / "shrink.md", text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
