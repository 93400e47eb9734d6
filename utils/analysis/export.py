"""`--export onnx`: networks of finished levels, shrunk or masked, as ONNX files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils.analysis.level import network_of, params_of
from utils.data.resolve import resolve
from utils.models.onnx_file import read_facts, write_onnx
from utils.params import Params
from utils.reporting import read_row
from utils.system.errors import UserError
from utils.system.rundir import LevelDir, RunDir


def export_levels(params: Params, run: RunDir, levels: Sequence[int]) -> list[str]:
    """Write `model.onnx` into the folders of finished levels; a line about each. Those that are up to date stay."""
    lines = []
    for number in levels:
        place = run.level(number)
        if place.row.is_file():
            lines.append(export_level(params, place, place.onnx))
    return lines


def export_run(run: str | Path, level: int, out: Path, average: bool = False) -> str:
    """Write one level of the run in folder `run` to `out`; returns a line about it. Raises UserError."""
    place, params = RunDir(Path(run)), params_of(run)
    if not place.level(level).row.is_file():
        found = ", ".join(str(number) for number in place.levels() if place.level(number).row.is_file()) or "none"
        raise UserError(f"{run}: level {level} is not finished (finished: {found}); choose another --level")
    return export_level(params, place.level(level), out, average)


def export_level(params: Params, place: LevelDir, out: Path, average: bool = False) -> str:
    """Write a finished level's network to `out`; returns a line about it.

    Pruned weights are the zeros they are in the weight file; a network made smaller is written in its own widths.
    Images are expected as training sees them: (pixel - mean) / std, with both in the file's metadata.
    """
    row = read_row(place.row)
    facts = _facts(params, row, average)
    if out.is_file() and read_facts(out).get("weights_digest") == facts["weights_digest"]:
        return f"{out}: is up to date"
    network = network_of(params, place, average)
    spec = resolve(params.data)
    difference = write_onnx(network, out, spec.eval_size, facts, params.model.name)
    return f"{out}: {row['kept_weights']:,} weights, onnxruntime within {difference:.0e} of torch"


def _facts(params: Params, row: dict[str, Any], average: bool) -> dict[str, Any]:
    """What the file says of itself."""
    spec = resolve(params.data)
    weights = str(row["weights_digest"])
    facts = {name: row[name] for name in ("run", "level", "model", "dataset", "density", "macs", "parameters")}
    facts |= {"mask_digest": str(row["mask_digest"]), "weights": "average" if average else "last"}
    facts |= {"weights_digest": f"average of {weights}" if average else weights}
    return facts | {"mean": list(spec.mean), "std": list(spec.std)}
