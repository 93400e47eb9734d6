"""Pairs of masks by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from utils.analysis.mask_maps import mask_rows, plot_masks, read_masks
from utils.masks import Masks
from utils.system.errors import UserError


def mask(first: str, second: str) -> Masks:
    return Masks({name: torch.tensor([c == "1" for c in bits]) for name, bits in (("a", first), ("b", second))})


MASKS = {"x": mask("1100", "10"), "y": mask("1010", "10"), "z": mask("0000", "01")}


def test_rows_by_hand() -> None:
    rows = {(row["a"], row["b"], row["parameter"]): row for row in mask_rows(MASKS)}
    assert len(rows) == 9
    assert (rows["x", "y", "a"]["hamming"], rows["x", "y", "a"]["jaccard"]) == (2, 1 / 3)
    assert (rows["x", "y", "b"]["hamming"], rows["x", "y", "b"]["jaccard"]) == (0, 1.0)
    total = rows["x", "z", "total"]
    assert (total["hamming"], total["jaccard"], total["weights"], total["hamming_share"]) == (4, 0.0, 6, 4 / 6)


def test_files_and_the_levels_of_a_run(tmp_path: Path) -> None:
    for number, masks in enumerate(MASKS.values()):
        folder = tmp_path / "run" / f"level_{number:02d}"
        folder.mkdir(parents=True)
        masks.save(folder / "mask.safetensors")
    MASKS["x"].save(tmp_path / "m.safetensors")
    found = read_masks([tmp_path / "run", tmp_path / "m.safetensors"])
    assert list(found) == ["run level 0", "run level 1", "run level 2", str(tmp_path / "m.safetensors")]
    assert found["run level 2"] == MASKS["z"]
    assert plot_masks(mask_rows(found), tmp_path / "m.png").read_bytes().startswith(b"\x89PNG")


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    for parent, masks in (("one", "x"), ("two", "y")):
        folder = tmp_path / parent / "run" / "level_00"
        folder.mkdir(parents=True)
        MASKS[masks].save(folder / "mask.safetensors")
    found = read_masks([tmp_path / "one" / "run", tmp_path / "two" / "run"])
    assert list(found) == [f"{tmp_path / parent / 'run'} level 0" for parent in ("one", "two")]
    assert found[f"{tmp_path}/two/run level 0"] == MASKS["y"]


def test_refusals(tmp_path: Path) -> None:
    MASKS["x"].save(tmp_path / "m.safetensors")
    with pytest.raises(UserError, match="one mask alone"):
        read_masks([tmp_path / "m.safetensors"])
    with pytest.raises(UserError, match="no masks in it"):
        read_masks([tmp_path])
    with pytest.raises(UserError, match=r"x and other: .* is in one of the masks only"):
        mask_rows({"x": MASKS["x"], "other": Masks({"a": torch.ones(4, dtype=torch.bool)})})
