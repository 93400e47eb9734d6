"""Finding the native library, and saying why it cannot be used."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from utils import native


@pytest.fixture(autouse=True)
def _not_cached() -> Iterator[None]:
    native.load.cache_clear()
    yield
    native.load.cache_clear()


def test_a_library_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "none.so")
    with pytest.raises(native.Missing, match="not built"):
        native.load()


def test_a_library_that_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "text.so")
    native.LIBRARY.write_text("not machine code")
    with pytest.raises(native.Missing, match="cannot be loaded"):
        native.load()


def test_a_library_of_other_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    if not native.LIBRARY.is_file():
        pytest.skip("the native library is not built")
    monkeypatch.setattr(native, "digest", lambda: "0" * 16)
    with pytest.raises(native.Missing, match="other sources"):
        native.load()


def test_the_makefile_takes_the_digest_python_takes() -> None:
    command = f"cat {' '.join(native.SOURCES)} | sha256sum | cut -c1-16"
    done = subprocess.run(["bash", "-c", command], cwd=native.HERE, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == native.digest()
    makefile = (native.HERE / "Makefile").read_text()
    assert "cat $(SOURCES) Makefile | sha256sum | cut -c1-16" in makefile
    assert f"SOURCES := {' '.join(native.SOURCES[:-1])}" in makefile
    assert {path.name for path in native.HERE.glob("*.cpp")} == set(native.SOURCES[:-1])
    assert "march" not in makefile
