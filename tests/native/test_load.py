"""Finding the native library, and saying why it cannot be used."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.native_library import need_decoder, need_update
from utils import native

LOADS = {"LIBRARY": native.load, "UPDATE": native.load_update}


@pytest.fixture(autouse=True)
def _not_cached() -> Iterator[None]:
    for load in LOADS.values():
        load.cache_clear()
    yield
    for load in LOADS.values():
        load.cache_clear()


@pytest.mark.parametrize("library", LOADS)
def test_a_library_that_is_not_there(library: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, library, tmp_path / "none.so")
    with pytest.raises(native.Missing, match="not built"):
        LOADS[library]()


@pytest.mark.parametrize("library", LOADS)
def test_a_library_that_is_none(library: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "text.so"
    monkeypatch.setattr(native, library, path)
    path.write_text("not machine code")
    with pytest.raises(native.Missing, match="cannot be loaded"):
        LOADS[library]()


@pytest.mark.parametrize("library", LOADS)
def test_a_library_of_other_sources(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    {"LIBRARY": need_decoder, "UPDATE": need_update}[library]()
    LOADS[library].cache_clear()
    monkeypatch.setattr(native, "digest", lambda sources: "0" * 16)
    with pytest.raises(native.Missing, match="other sources"):
        LOADS[library]()


def test_the_makefile_takes_the_digests_python_takes() -> None:
    makefile = (native.HERE / "Makefile").read_text()
    for variable, sources in (("SOURCES", native.SOURCES), ("UPDATE_SOURCES", native.UPDATE_SOURCES)):
        command = f"cat {' '.join(sources)} | sha256sum | cut -c1-16"
        done = subprocess.run(["bash", "-c", command], cwd=native.HERE, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == native.digest(sources)
        assert f"cat $({variable}) Makefile | sha256sum | cut -c1-16" in makefile
        assert f"\n{variable} := {' '.join(sources[:-1])}\n" in makefile
    built = {*native.SOURCES[:-1], *native.UPDATE_SOURCES[:-1]}
    assert {path.name for path in native.HERE.glob("*.cpp")} == built
    assert "march" not in makefile
