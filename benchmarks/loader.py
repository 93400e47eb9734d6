"""`python -m benchmarks.loader`: images per CPU second of the loaders, side by side, against what they replace.

Random resized crops of 224 pixels and mirrors, as bytes, from the same .beton files: pictures of 500 pixels as JPEG of
quality 90, and of 256 pixels raw. The pictures are synthetic (`benchmarks.pictures`); their bytes per pixel, which is
what a JPEG decoder's time depends on, are those of photographs. Peers: FFCV's own loader and decoder; a DataLoader over
libturbojpeg and OpenCV, as a reader of JPEG files would write it; one over Pillow and torchvision. For CIFAR-10's size
the `device` loader stands against a torchvision DataLoader.

Every arm lives in a process of its own, since FFCV's loader changes numba's types for the whole process, and reads one
epoch whenever it is asked. The cost of an epoch is the CPU time of all its threads, so figures are per core.

With --workers or --device, instead: one loader on so many threads by the wall clock, and training that it feeds
(`benchmarks.feeding`), for which no peer need be installed.

    python -m benchmarks.loader
    python -m benchmarks.loader --workers 16 --device cuda
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks import feeding, loader_arms, measure
from benchmarks.loader_arms import Process
from benchmarks.measure import Report, figure
from benchmarks.pictures import Pictures
from utils.data import beton, beton_format
from utils.system.cpus import allowed_cpus

JPEG, RAW = "500 px q90 JPEG", "256 px raw"
SIEVE, FFCV, TURBO, PILLOW = "sieve", "ffcv", "turbojpeg", "pillow"


def write_files(folder: Path, images: int) -> dict[str, Path]:
    """Both .beton files; prints what an image weighs."""
    paths = {}
    for name, side, mode in ((JPEG, None, "jpg"), (RAW, 256, "raw")):
        paths[name] = folder / f"{mode}.beton"
        beton.write(Pictures(images, side=side), paths[name], loader_arms.spec_of(mode), 1)
        header = beton_format.read_header(paths[name])
        table = beton_format.image_table(header, beton_format.read_metadata(header))
        print(f"{name}: {images} pictures, {table[:, 1].mean() / 1e3:.1f} KB each", flush=True)
    return paths


def check(report: Report, paths: dict[str, Path], arm: Process) -> None:
    """The gates: FFCV's pixels to the bit, any number of threads, nothing lost."""
    for name, path in paths.items():
        wrong, pixels = arm.ask("compare", str(path))
        report.gate(f"{name}: data.resize=ffcv gives FFCV's pixels", wrong == 0, f"{wrong:.0f} of {pixels:.0f} differ")
    for resize in ("ffcv", "area", "bilinear"):
        one, two = (arm.ask("digest", str(paths[JPEG]), resize, str(threads)) for threads in (1, 2))
        report.gate(f"data.resize={resize}: the same pixels from one thread and two", one == two)


def compare(report: Report, paths: dict[str, Path], rounds: int) -> None:
    """The rows of stored images."""
    with Process(TURBO, paths[JPEG]) as turbo, Process(FFCV, paths[JPEG]) as ffcv:
        for resize in ("ffcv", "area", "bilinear"):
            with Process(SIEVE, paths[JPEG], resize) as sieve:
                arm = f"sieve, resize={resize}"
                pair(report, f"{JPEG}, against FFCV", arm, sieve, "FFCV 1.0.2", ffcv, rounds, ">= 2.0")
                pair(report, f"{JPEG}, against turbojpeg", arm, sieve, "turbojpeg DataLoader", turbo, rounds, ">= 1.3")
        with Process(SIEVE, paths[JPEG], "ffcv") as sieve, Process(PILLOW, paths[JPEG]) as pillow:
            pair(report, f"{JPEG}, against Pillow", "sieve, resize=ffcv", sieve, "Pillow DataLoader", pillow, rounds)
    with Process(FFCV, paths[RAW]) as ffcv, Process(SIEVE, paths[RAW], "ffcv") as sieve:
        row = pair(report, f"{RAW}, against FFCV", "sieve, resize=ffcv", sieve, "FFCV 1.0.2", ffcv, rounds)
        assert row.arm_value is not None
        report.add(figure(f"{RAW}, per core", "sieve, resize=ffcv", row.arm_value, "images/s", ">= 5,000"))


def compare_device(report: Report, rounds: int, where: str = "cpu") -> None:
    """The row of the `device` loader, whose images lie on `where`; its peer is one process that has to bring them."""
    name = "CIFAR-10, device loader" + (f", {where}, wall clock" if where != "cpu" else "")
    with Process("device", None, where) as device, Process("torchvision", None, where) as peer:
        target = ">= 5" if where == "cpu" else ">= 20"
        pair(report, name, "sieve", device, "torchvision DataLoader", peer, rounds, target)


def compare_threads(report: Report, path: Path, threads: int, device: torch.device, each: int, rounds: int) -> None:
    """The rows of one loader on several threads, alone and at work."""
    one, several = (loader_arms.digest(path, "ffcv", number) for number in (1, threads))
    report.gate(f"the same pixels from one thread and {threads}", one == several)
    feeding.threads_row(report, JPEG, path, threads, each, rounds)
    feeding.overlap_row(report, path, feeding.feed_of(device, threads, each), rounds)


def pair(
    report: Report, name: str, arm: str, ours: Process, peer: str, theirs: Process, rounds: int, target: str = ""
) -> measure.Row:
    """One row: epochs in turn, each arm's cost being seconds an image."""
    pairs = measure.interleave(ours.cost, theirs.cost, rounds)
    return report.add(measure.faster(name, arm, peer, pairs, target))


def main(arguments: list[str]) -> int:
    """Measure and write benchmarks/out/loader.csv; 1 where a gate fails."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loader", description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=256, help="pictures in each file (default 256)")
    parser.add_argument("--rounds", type=int, default=9, help="pairs a row (default 9)")
    parser.add_argument("--workers", type=int, default=1, help="threads of one loader (default 1)")
    parser.add_argument("--device", default="", help="cpu or cuda: what training fed by the loader runs on")
    parser.add_argument("--each", type=int, default=1024, help="with --workers: images a thread and run (default 1024)")
    parser.add_argument("--out", type=Path, default=measure.OUT, help="where loader.csv goes")
    given = parser.parse_args(arguments)
    if not 1 <= given.workers <= allowed_cpus():
        parser.error(f"--workers {given.workers}: this process may use 1 to {allowed_cpus()} CPUs")
    report = Report("loader", ("ffcv", "numba", "opencv-python-headless", "torchvision", "pillow"), given.out)
    with tempfile.TemporaryDirectory() as folder:
        paths = write_files(Path(folder), given.images)
        if given.device or given.workers > 1:
            device = torch.device(given.device or "cpu")
            compare_threads(report, paths[JPEG], given.workers, device, given.each, given.rounds)
            if device.type == "cuda":
                compare_device(report, given.rounds, "cuda")
            return report.finish()
        with Process("checks", None) as arm:
            check(report, paths, arm)
        compare(report, paths, given.rounds)
        compare_device(report, given.rounds)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
