"""Files from others: damaged ones give a value within their size or one line that names them; never anything else."""

from __future__ import annotations

import json
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import levels_cases
from tests.data.beton_cases import Pictures, spec_of
from tests.fuzzing import damaged
from utils import files
from utils.data import beton, beton_format
from utils.masks import Masks
from utils.models import pretrained
from utils.params.load import build
from utils.params.parsing import dump
from utils.params.yaml_file import read_yaml
from utils.pruning.convert import convert
from utils.reporting import read_row
from utils.system.errors import UserError

MASKS = Masks(
    {"one.weight": torch.arange(60).reshape(6, 10) % 3 == 0, "two.weight": torch.ones(4, 2, dtype=torch.bool)}
)
ROW = {
    "run": "sieve-0123456789", "seed": 0, "level": 1, "target_density": 0.5, "density": 0.5, "sparsity": 0.5,
    "kept_weights": 10, "prunable_weights": 20, "epochs": 2, "mask_digest": "ab" * 32, "train_loss": 1.25,
}  # fmt: skip
SLACK = 4 << 20
"""Bytes beyond some multiples of a file's size that a reader may take, for the interpreter's own."""


def _masks(path: Path) -> None:
    assert Masks.load(path) == MASKS


def _tensors(path: Path) -> None:
    tensors, _ = files.load_tensors(path)
    assert sum(t.numel() * t.element_size() for t in tensors.values()) < path.stat().st_size
    assert len(files.digest(tensors)) == 64
    repr(tensors)


def _row(path: Path) -> None:
    json.dumps(read_row(path), allow_nan=False).encode()


def _config(path: Path) -> None:
    build(read_yaml(path))


def _beton(path: Path) -> None:
    header = beton_format.read_header(path)
    metadata = beton_format.read_metadata(header)
    table = beton_format.image_table(header, metadata)
    assert metadata.nbytes + table.nbytes < 2 * header.size
    assert (table[:, 0] + table[:, 1] <= header.size).all()


@pytest.fixture(scope="module")
def valid(tmp_path_factory) -> dict[str, bytes]:
    """A whole file of every kind."""
    folder = tmp_path_factory.mktemp("valid")
    MASKS.save(folder / "mask", source="ab")
    state = {
        "a": torch.randn(4, 5),
        "b": torch.arange(6),
        "c": torch.zeros((), dtype=torch.bfloat16),
        "d": torch.ones(3) > 0,
    }
    files.save_weights(folder / "weights", state, mask_digest="ab")
    (folder / "row").write_text(json.dumps(ROW, indent=2))
    (folder / "config").write_text(
        yaml.safe_dump(dump(levels_cases.config(folder, 2, levels__count=2)), sort_keys=False)
    )
    spec = spec_of(folder, write_mode="raw")
    beton.write(Pictures(12, sizes=(2, 3)), folder / "beton", spec, 1)
    return {name: (folder / name).read_bytes() for name in READERS}


READERS: dict[str, Callable[[Path], None]] = {
    "mask": _masks, "weights": _tensors, "row": _row, "config": _config, "beton": _beton
}  # fmt: skip
QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]


def _refusal(kind: str, path: Path) -> str | None:
    try:
        READERS[kind](path)
    except UserError as error:
        return str(error)
    return None


def _judge(kind: str, path: Path, blob: bytes) -> bool:
    """Read `blob`; True when it was refused, properly."""
    path.write_bytes(blob)
    tracemalloc.start()
    message = _refusal(kind, path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60 * len(blob) + SLACK
    if message is not None:
        assert "\n" not in message
        # A config's error may name the key alone: which file gave it is told where files are merged.
        assert path.name in message or kind == "config"
    return message is not None


@pytest.mark.parametrize("kind", READERS)
def test_whole_files_are_read(valid, tmp_path, kind) -> None:
    assert not _judge(kind, tmp_path / "file", valid[kind])


def _fuzz(kind: str, valid: dict[str, bytes], tmp_path: Path, examples: int) -> None:
    refused: list[bool] = []

    @settings(max_examples=examples, deadline=10_000, suppress_health_check=QUIET, database=None)
    @given(st.data())
    def one(data: Any) -> None:
        most = 1 if kind == "mask" else 3
        refused.append(_judge(kind, tmp_path / "file", data.draw(damaged(valid[kind], most))))

    one()
    assert any(refused)


@pytest.mark.parametrize("kind", READERS)
def test_damaged_files_are_read_or_refused(valid, tmp_path, kind) -> None:
    _fuzz(kind, valid, tmp_path, 120)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", READERS)
def test_damaged_files_are_read_or_refused_long(valid, tmp_path, kind) -> None:
    _fuzz(kind, valid, tmp_path, 5000)


def header(entries: object, data: bytes = b"") -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: object, shape: object, *offsets: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


TENSOR_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "0 bytes are too few"),
    "header beyond the file": ((2**63).to_bytes(8, "little") + b"{}", "10 bytes are too few"),
    "no JSON": (header(b"\x80\x04pickle"), "not UTF-8"),
    "deep": (header(b'{"a":' + b"[" * 100_000), "nested too deeply|Expecting value"),
    "key twice": (header(b'{"a":1,"a":2}'), "'a' is given twice"),
    "huge shape": (header({"a": entry("F32", [2**40, 2**40], 0, 4)}, bytes(4)), "no possible shape"),
    "shape beyond its bytes": (
        header({"a": entry("F32", [1000], 0, 4)}, bytes(4)),
        "has 4 bytes, its shape needs 4000",
    ),
    "negative": (header({"a": entry("F32", [-1], 0, 4)}, bytes(4)), "no possible shape"),
    "negative offset": (header({"a": entry("F32", [1], -4, 0)}, bytes(4)), "no possible place"),
    "huge digits": (header(b'{"a":' + b"9" * 5000 + b"}"), "a number of 5000 digits"),
    "overlap": (
        header({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 2, 6)}, bytes(6)),
        "'b' does not begin where",
    ),
    "hole": (header({"a": entry("U8", [1], 0, 1), "b": entry("U8", [1], 2, 3)}, bytes(3)), "'b' does not begin where"),
    "beyond the end": (header({"a": entry("U8", [2**40], 0, 2**40)}, bytes(4)), "truncated"),
    "bytes left": (header({"a": entry("U8", [1], 0, 1)}, bytes(3)), "2 bytes too many"),
    "unknown type": (header({"a": entry("PICKLE", [1], 0, 1)}, bytes(1)), "unknown type 'PICKLE'"),
    "type is a list": (header({"a": entry(["F32"], [1], 0, 4)}, bytes(4)), "unknown type"),
    "no bool": (header({"a": entry("BOOL", [1], 0, 1)}, b"\x07"), "neither true nor false"),
    "metadata": (header({"__metadata__": {"a": 1}}), "metadata are not texts"),
    "half a character": (header(b'{"__metadata__":{"a":"\\ud800"}}'), "surrogate"),
}


@pytest.mark.parametrize("kind", TENSOR_FILES)
def test_crafted_tensor_files_are_refused(tmp_path, kind) -> None:
    blob, words = TENSOR_FILES[kind]
    (tmp_path / "file").write_bytes(blob)
    for read in (files.load_tensors, files.load_metadata, Masks.load):
        if kind == "no bool" and read is files.load_metadata:
            continue
        with pytest.raises(UserError, match=rf"file: not a whole safetensors file \(.*({words})"):
            read(tmp_path / "file")


def test_shapes_of_another_model_are_refused_before_memory_is_taken(tmp_path, monkeypatch) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2))
    files.save_tensors(tmp_path / "w", {"0.weight": torch.zeros(50, 50), "0.bias": torch.zeros(2)}, {})
    Masks({"0.weight": torch.ones(50, 50, dtype=torch.bool)}).save(tmp_path / "m")
    monkeypatch.setattr(files, "_read", lambda *_: pytest.fail("read before the shapes were checked"))
    with pytest.raises(UserError, match=r"w: '0\.weight' has shape \(50, 50\), the model's is \(2, 3\)"):
        files.load_weights(tmp_path / "w", model)
    with pytest.raises(UserError, match=r"m: '0\.weight' has shape 50x50, the model's is 2x3"):
        Masks.load(tmp_path / "m", model)


def _loop() -> dict[str, Any]:
    content: dict[str, Any] = {}
    content["model"] = content
    return content


CHECKPOINTS: dict[str, tuple[Callable[[], object], str]] = {
    "one value as a terabyte": (lambda: {"a.weight": torch.zeros(1).expand(2**20, 2**20)}, "more than the file holds"),
    "a dict that holds itself": (_loop, "no mask found|no tensor"),
    "no memory": (lambda: {"a.weight": torch.zeros(2, 2, device="meta")}, "no plain tensor"),
    "sparse": (
        lambda: {
            "a.weight": torch.sparse_coo_tensor(torch.zeros(2, 1, dtype=torch.long), torch.ones(1), (2**20, 2**20))
        },
        "more than the file holds",
    ),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_crafted_checkpoints_are_refused(tmp_path, kind) -> None:
    make, words = CHECKPOINTS[kind]
    torch.save(make(), tmp_path / "file.pt")
    for read in (convert, pretrained.read):
        with pytest.raises(UserError, match=words) as caught:
            read(tmp_path / "file.pt")
        assert "\n" not in str(caught.value)


def test_a_compressed_archive_is_refused_before_it_is_unpacked(tmp_path) -> None:
    torch.save({"a.weight": torch.zeros(1000, 1000)}, tmp_path / "whole.pt")
    with (
        zipfile.ZipFile(tmp_path / "whole.pt") as whole,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for name in whole.namelist():
            bomb.writestr(name, whole.read(name))
    for read in (convert, pretrained.read):
        with pytest.raises(UserError, match=r"bomb\.pt: unpacks to 4\d{6} bytes"):
            read(tmp_path / "bomb.pt")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('run: {name: "\\UFFFFFFFF"}', "escape that is no character"),
        ("run: {name: !!python/object/apply:os.system [true]}", "tags"),
        ("a: &a [x]\nb: *a", "aliases"),
        ("run: {seed: " + "9" * 5000 + "}", "run.seed: expected"),
        ("[" * 5000, "nested too deeply"),
        ("run: {name: ../../outside}", "run.name"),
        ("run: {name: a/b}", "run.name"),
    ],
)
def test_crafted_configs_are_refused(tmp_path, text, words) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        build(read_yaml(tmp_path / "c.yaml"))
    assert "\n" not in str(caught.value)


def test_a_run_writes_nothing_through_a_link(tmp_path) -> None:
    params = levels_cases.config(tmp_path / "runs", 1, levels__densities=[1.0])
    from utils.record import run_dir

    (tmp_path / "victim").write_text("mine")
    level = run_dir(params).level(0)
    level.path.mkdir(parents=True)
    level.epochs.symlink_to(tmp_path / "victim")
    with pytest.raises(UserError, match=r"epochs\.csv: is a symbolic link"):
        levels_cases.run(params)
    assert (tmp_path / "victim").read_text() == "mine"
    assert np.all([not path.name.startswith("environment") for path in run_dir(params).path.iterdir()])
