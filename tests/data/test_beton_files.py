"""Checking .beton files before use: damaged, foreign and other people's."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from tests.data.beton_cases import CLASSES, Pictures, spec_of
from utils.data import beton
from utils.data.spec import DataSpec
from utils.system.errors import UserError


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A good file with its spec; tests copy it before they spoil it."""
    folder = tmp_path_factory.mktemp("written")
    spec = spec_of(folder, write_mode="raw")
    path = beton.path_of(spec, "train")
    beton.write(Pictures(), path, spec, 1)
    return spec, path.read_bytes(), beton.sidecar_of(path).read_text()


def spoilt(tmp_path: Path, blob: bytes, sidecar: str | None) -> Path:
    path = tmp_path / "spoilt.beton"
    path.write_bytes(blob)
    if sidecar is not None:
        beton.sidecar_of(path).write_text(sidecar)
    return path


def refused(path: Path, spec: DataSpec, words: str, split: str = "train", verify: bool = False) -> None:
    with pytest.raises(UserError, match=words) as caught:
        beton.check(path, spec, split, verify)
    assert path.name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("with_sidecar", [True, False])
@pytest.mark.parametrize("kept", [0, 10, 1000, 5000, -1, -24])
def test_a_truncated_file_is_refused(tmp_path, written, kept, with_sidecar):
    spec, blob, sidecar = written
    path = spoilt(tmp_path, blob[:kept], sidecar if with_sidecar else None)
    refused(path, spec, "truncated" if with_sidecar else "truncated|not a .beton|other fields")


def test_a_foreign_file_is_refused(tmp_path, written):
    spec, blob, _ = written
    for foreign in (b"\x89PNG\r\n" + bytes(5000), bytes(range(256)) * 40, b"\x01" + blob[1:]):
        refused(spoilt(tmp_path, foreign, None), spec, "not a .beton file")
    # an integer where the image should be
    fields = bytearray(blob)
    fields[24] = 1
    refused(spoilt(tmp_path, bytes(fields), None), spec, "other fields")
    refused(tmp_path / "absent.beton", spec, "no such file")


@pytest.mark.parametrize(
    ("place", "kind", "value"),
    [
        (8, "<Q", 2**60),
        (8, "<Q", 0),
        (8, "<Q", 2**64 - 1),
        (16, "<Q", 2**62),
        (16, "<Q", 0),
        (4, "<I", 0),
        (4, "<I", 3 << 20),
    ],
)
def test_absurd_header_values_are_refused_before_memory_is_taken(tmp_path, written, place, kind, value):
    spec, blob, _ = written
    absurd = bytearray(blob)
    struct.pack_into(kind, absurd, place, value)
    path = spoilt(tmp_path, bytes(absurd), None)
    refused(path, spec, "truncated|unfinished|page size")
    with pytest.raises(UserError):
        beton.labels(path)


@pytest.mark.parametrize("column", ["mode", "width", "data_ptr"])
def test_records_that_point_elsewhere_are_refused(tmp_path, written, column):
    spec, blob, _ = written
    absurd = bytearray(blob)
    offset, kind, value = {"mode": (0, "<B", 9), "width": (1, "<H", 999), "data_ptr": (5, "<Q", 2**63)}[column]
    struct.pack_into(kind, absurd, 24 + 2 * 1041 + 24 * 17 + offset, value)
    refused(spoilt(tmp_path, bytes(absurd), None), spec, "image 17 ")


def test_a_flipped_bit_is_found_when_asked_for(tmp_path, written):
    spec, blob, sidecar = written
    path = spoilt(tmp_path, blob[:-5000] + bytes([blob[-5000] ^ 1]) + blob[-4999:], sidecar)
    beton.check(path, spec, "train")
    refused(path, spec, "SHA-256", verify=True)


def test_other_classes_or_parameters_are_refused(tmp_path, written):
    spec, blob, sidecar = written
    other = json.loads(sidecar)
    refused(spoilt(tmp_path, blob, json.dumps({**other, "classes": ["a", "b"]})), spec, "2 classes where folder has 3")
    refused(spoilt(tmp_path, blob, sidecar), spec_of(tmp_path, write_mode="raw", max_resolution=70), "written with")
    refused(spoilt(tmp_path, blob, json.dumps({**other, "samples": 7})), spec, "says 7")
    for text in ("{", "[]", "{}", json.dumps({**other, "format": 9}), json.dumps({**other, "bytes": "many"})):
        with pytest.raises(UserError, match=r"spoilt\.json: not a sidecar"):
            beton.check(spoilt(tmp_path, blob, text), spec, "train")


def test_a_file_without_sidecar_is_taken_when_it_fits(tmp_path, written, capsys):
    spec, blob, sidecar = written
    path = spoilt(tmp_path, blob, None)
    found = beton.check(path, spec, "train")
    assert "no spoilt.json" in capsys.readouterr().err
    assert found["sha256"] is None
    assert found["histogram"] == json.loads(sidecar)["histogram"]
    changed = bytearray(blob)
    struct.pack_into("<q", changed, 24 + 2 * 1041 + 16, 1)  # sample 0 gets another label
    assert beton.check(spoilt(tmp_path, bytes(changed), None), spec, "train")["digest"] != found["digest"]
    struct.pack_into("<q", changed, 24 + 2 * 1041 + 16, CLASSES)
    refused(spoilt(tmp_path, bytes(changed), None), spec, "labels 0 to 3")
