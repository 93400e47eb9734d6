""".beton files of a data set: named, written when missing, checked before use, described by a sidecar.

`python -m utils.data.beton --data.name=cifar10 ...` writes them ahead of training (`--force=true` writes them anew).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from utils.data import beton_format
from utils.data.beton_format import MEND
from utils.data.beton_writer import Encoder, Progress, write_images
from utils.data.datasets import SPLITS, open_split
from utils.data.datasets.sources import FileSource, MissingData, holds_images, one_line
from utils.data.lock import locked
from utils.data.protocol import Source
from utils.data.spec import DataSpec
from utils.system import atomic
from utils.system.cpus import allowed_cpus
from utils.system.errors import EXIT_BAD_INPUT, UserError
from utils.system.json_file import read_json

SIDECAR_FORMAT = 1

SIDECAR_LIMIT = 8 << 20
"""Bytes a sidecar may have: those of some hundred thousand class names."""


def writer_parameters(spec: DataSpec) -> dict[str, Any]:
    """What decides a file's bytes, apart from the images; parameters without effect in spec.write_mode are left out."""
    found: dict[str, Any] = {"format": SIDECAR_FORMAT, "mode": spec.write_mode, "max_resolution": spec.max_resolution}
    if spec.write_mode != "raw":
        found["jpeg_quality"] = spec.data.jpeg_quality
    if spec.write_mode == "proportion":
        found["compress_probability"] = spec.data.compress_probability
    return found


def path_of(spec: DataSpec, split: str) -> Path:
    """`<betons>/<name>-<split>-<8 hex of the writer parameters>.beton`."""
    text = json.dumps(writer_parameters(spec), sort_keys=True)
    return spec.betons / f"{spec.name}-{split}-{hashlib.sha256(text.encode()).hexdigest()[:8]}.beton"


def sidecar_of(path: Path) -> Path:
    """The JSON file beside `path` that describes it."""
    return path.with_suffix(".json")


def write(source: Source, path: Path, spec: DataSpec, workers: int, progress: bool = False) -> None:
    """Write `source` to `path` and its sidecar, each whole or not at all, with up to `workers` processes.

    The bytes depend on the images and `writer_parameters` alone. Raises UserError naming the image that cannot be read.
    """
    labels = np.asarray(source.labels, dtype=np.int64)
    if len(source.classes) != spec.classes:
        raise UserError(f"{spec.directory}: has {len(source.classes)} classes where {spec.name} has {spec.classes}")
    if len(labels) == 0 or labels.min() < 0 or labels.max() >= spec.classes:
        raise UserError(f"{spec.name}: no images, or labels outside 0..{spec.classes - 1}; check {spec.directory}")
    encoder = Encoder(spec.write_mode, spec.max_resolution, spec.data.jpeg_quality, spec.data.compress_probability)
    digest = source.digest()  # before any image is read: one that changes meanwhile must not pass for what was written
    bar = Progress(path, len(labels), progress)
    try:
        with atomic.replacing(path, "free some space or set data.betons") as temporary:
            with open(temporary, "wb") as handle:
                write_images(handle, source, encoder, max(1, min(workers, allowed_cpus())), bar)
            sidecar = {
                "format": SIDECAR_FORMAT,
                "samples": len(labels),
                "classes": [str(name) for name in source.classes],
                "histogram": np.bincount(labels, minlength=len(source.classes)).tolist(),
                "writer": writer_parameters(spec),
                "directory": str(spec.directory.resolve()),
                "source": digest,
                "bytes": temporary.stat().st_size,
                "sha256": atomic.sha256(temporary),
            }
            # An older sidecar must never stand beside a newer file.
            sidecar_of(path).unlink(missing_ok=True)
    finally:
        bar.close()
    atomic.write_json(sidecar_of(path), sidecar)


def check(path: Path, spec: DataSpec, split: str, verify: bool = False) -> dict[str, Any]:
    """The sidecar of `path`, once the file is found to be what `spec` asks for; `verify` reads it whole.

    A file without a sidecar (written by another tool) is accepted when everything its header and tables say holds; its
    `sha256` is then None. `digest` identifies the file in both cases. Raises UserError naming the file and the mend.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; write it with python -m utils.data.beton --data.name={spec.name}")
    sidecar = _read_sidecar(path) if sidecar_of(path).is_file() else None
    size = path.stat().st_size
    if sidecar is not None and sidecar["bytes"] != size:
        raise UserError(f"{path}: truncated or changed ({size} bytes, {sidecar['bytes']} when it was written); {MEND}")
    header = beton_format.read_header(path)
    if sidecar is None:
        return _without_sidecar(header, spec, split)
    _compare(path, sidecar, header.samples, spec)
    if verify and atomic.sha256(path) != sidecar["sha256"]:
        raise UserError(f"{path}: damaged (its SHA-256 is not that of {sidecar_of(path).name}); {MEND}")
    return sidecar


def labels(path: Path) -> np.ndarray:
    """Labels of all samples, int64 [N], without decoding any image. Raises UserError for a damaged file."""
    header = beton_format.read_header(path)
    return beton_format.read_metadata(header)["label"].astype(np.int64)


def check_source(path: Path, spec: DataSpec, split: str, sidecar: dict[str, Any]) -> None:
    """Raise UserError when `path` was written from other images than the source holds, as names, sizes and labels tell.

    A source that is gone, or that `path`'s writer did not note down, is no error.
    """
    written = sidecar.get("source")
    source = _listed(spec, split) if written else None
    if source is None or source.digest() == written:
        return
    origin = sidecar.get("directory", "")
    if origin == str(spec.directory.resolve()):
        raise UserError(f"{path}: stale, the images or classes in {origin} have changed since; {MEND}")
    raise UserError(f"{path}: written from {origin}, not from {spec.directory}; {MEND}")


def _listed(spec: DataSpec, split: str) -> FileSource | None:
    """The source as class folders; None when there are none, for torchvision holds its own files to their checksums."""
    if not any(holds_images(train) for train in (spec.directory / "train", *spec.directory.glob("*/train"))):
        return None
    try:
        source = open_split(spec.name, spec.directory, split)
    except MissingData:
        return None
    return source if isinstance(source, FileSource) else None


def ensure(
    spec: DataSpec, workers: int, download: bool, force: bool = False, progress: bool = True, compare: bool = True
) -> dict[str, Path]:
    """Paths of the splits "train" and "test", checked; missing files are written first, under a lock.

    Any number of processes may call this at once: one writes, the others wait. `force` writes them anew, `progress`
    reports the writing, `compare` holds files that are there against their source (one process of a node is enough).
    Raises UserError for a damaged or stale file, or, before anything is made, when a missing one's source is missing.
    """
    paths = {split: path_of(spec, split) for split in SPLITS}
    sources: dict[str, Source] = {}
    for split, path in paths.items():
        if force or not path.is_file():
            sources[split] = open_split(spec.name, spec.directory, split, download)
    for split, path in paths.items():
        written = split in sources and _written(sources[split], path, spec, split, workers, force, progress)
        if not written:
            _check_there(path, spec, split, compare)
    return paths


def _written(source: Source, path: Path, spec: DataSpec, split: str, workers: int, force: bool, progress: bool) -> bool:
    """Write `path` under the lock; False when another process was quicker."""
    with _lock(spec, path):
        if path.exists() and not force:
            return False
        for left in path.parent.glob(f".{path.name}.*.tmp"):  # of a killed writer: none is alive, we hold the lock
            left.unlink(missing_ok=True)
        started = time.perf_counter()
        write(source, path, spec, workers, progress)
        if progress:
            print(described(path, check(path, spec, split), time.perf_counter() - started), flush=True)
    return True


def _check_there(path: Path, spec: DataSpec, split: str, compare: bool) -> None:
    # A file whose sidecar has not come yet may be one that is just being finished: only the lock can tell.
    with contextlib.nullcontext() if sidecar_of(path).is_file() else _lock(spec, path):
        sidecar = check(path, spec, split)
    if compare:
        check_source(path, spec, split, sidecar)


def described(path: Path, sidecar: dict[str, Any], seconds: float) -> str:
    """One line about a file: samples, classes, size, and the seconds it took."""
    size = f"{sidecar['bytes'] / 1e6:.1f} MB"
    return f"{path}: {sidecar['samples']} samples, {len(sidecar['classes'])} classes, {size}, {seconds:.1f} s"


@contextlib.contextmanager
def _lock(spec: DataSpec, path: Path) -> Iterator[None]:
    """Hold the data set's writing lock, which the system frees when its holder dies.

    In a folder where nobody may write, nobody is writing: what is there is used without a lock.
    """
    waiting = f"waiting for another process that writes {spec.name} in {spec.betons}"
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(spec.betons / f".{spec.name}.lock", waiting))
        except OSError as error:
            if not path.is_file():
                raise UserError(
                    f"{spec.betons}: cannot write there ({one_line(error)}); set data.betons elsewhere"
                ) from error
        yield


def _read_sidecar(path: Path) -> dict[str, Any]:
    place = sidecar_of(path)
    try:
        sidecar = read_json(place, SIDECAR_LIMIT)
        wanted = {"samples": int, "classes": list, "histogram": list, "writer": dict, "bytes": int, "sha256": str}
        whole = sidecar["format"] == SIDECAR_FORMAT and all(isinstance(sidecar[k], kind) for k, kind in wanted.items())
    except (OSError, ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise UserError(f"{place}: not a sidecar of format {SIDECAR_FORMAT}; delete it together with {path.name}")
    return {**sidecar, "digest": sidecar["sha256"]}


def _without_sidecar(header: beton_format.Header, spec: DataSpec, split: str) -> dict[str, Any]:
    metadata = beton_format.read_metadata(header)
    beton_format.image_table(header, metadata)
    found = metadata["label"]
    low, high = int(found.min()), int(found.max())
    if low < 0 or high >= spec.classes or (split == "train" and high != spec.classes - 1):
        raise UserError(f"{header.path}: labels {low} to {high}, where {spec.name} has {spec.classes} classes; {MEND}")
    print(f"{header.path}: no {sidecar_of(header.path).name} beside it; taken as it is", file=sys.stderr, flush=True)
    return {
        "format": SIDECAR_FORMAT,
        "samples": header.samples,
        "classes": [str(label) for label in range(spec.classes)],
        "histogram": np.bincount(found, minlength=spec.classes).tolist(),
        "writer": writer_parameters(spec),
        "source": None,
        "bytes": header.size,
        "sha256": None,
        "digest": beton_format.digest(header, metadata),
    }


def _compare(path: Path, sidecar: dict[str, Any], samples: int, spec: DataSpec) -> None:
    if sidecar["samples"] != samples:
        raise UserError(f"{path}: holds {samples} samples, {sidecar_of(path).name} says {sidecar['samples']}; {MEND}")
    if len(sidecar["classes"]) != spec.classes:
        raise UserError(f"{path}: has {len(sidecar['classes'])} classes where {spec.name} has {spec.classes}; {MEND}")
    if sidecar["writer"] != writer_parameters(spec):
        raise UserError(f"{path}: written with {sidecar['writer']}, not {writer_parameters(spec)}; {MEND}")


def main(arguments: list[str]) -> None:
    """Write both files of the data set the `data` section names, keeping good ones; print one line per file."""
    import harness_params  # reads the whole config strictly; nothing but an entry point may import it
    from utils.data.resolve import resolve

    options = {"force": "true writes files anew that are there already"}
    usage = "python -m utils.data.beton --data.name=NAME [--config FILE] [--section.key=value ...]"
    params, given = harness_params.load_with_or_exit(options, arguments, plan=False, usage=usage)
    try:
        force = _yes(given.get("force", "false"))
        spec = resolve(params.data)
        kept = [] if force else [split for split in SPLITS if path_of(spec, split).is_file()]
        paths = ensure(spec, params.data.workers or allowed_cpus(), params.data.download, force)
        for split in kept:
            started = time.perf_counter()
            sidecar = check(paths[split], spec, split, verify=True)
            print(described(paths[split], sidecar, time.perf_counter() - started), flush=True)
    except UserError as error:
        print(f"sieve: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except KeyboardInterrupt:
        print("sieve: interrupted; nothing half-written was left", file=sys.stderr)
        sys.exit(130)


def _yes(word: str) -> bool:
    if word.lower() not in ("true", "1", "yes", "false", "0", "no"):
        raise UserError(f"--force: true or false, not {word!r}")
    return word.lower() in ("true", "1", "yes")


if __name__ == "__main__":
    main(sys.argv[1:])
