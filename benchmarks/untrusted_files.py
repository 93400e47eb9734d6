"""Files nobody trusted: spoil files of a real run, run the commands that read them, and print what the user sees.

python -m benchmarks.untrusted_files     prints the table of docs/faults.md; ends with 1 when a case does not hold
python -m benchmarks.untrusted_files N   leaves out the first N cases
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
TINY = [
    "--data.name=digits", "--data.loader=device", "--data.subset=120", "--data.val=0", "--model.name=cifar/resnet20",
    "--training.epochs=1", "--training.batch_size=40", "--training.precision=float32", "--levels.count=2",
    "--levels.rate=0.5", "--run.name=tiny", "--run.root=runs",
]  # fmt: skip
BETON = ["utils.data.beton", "--data.name=digits", "--data.betons=betons"]


@dataclass(frozen=True)
class Case:
    """One bad file. make: spoils or writes it (given its path); command: what reads it; code: the exit code due."""

    what: str
    file: str
    make: Callable[[Path], object]
    command: list[str]
    code: int = 2


class Code:
    """A pickle that leaves a file behind when it is run."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch code_was_run",)


def _put(offset: int, value: int) -> Callable[[Path], object]:
    def spoil(path: Path) -> None:
        blob = bytearray(path.read_bytes())
        blob[offset : offset + 8] = value.to_bytes(8, "little")
        path.write_bytes(blob)

    return spoil


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def _flip(path: Path) -> None:
    blob = bytearray(path.read_bytes())
    blob[-1] ^= 64
    path.write_bytes(blob)


def _header(text: str) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(len(text).to_bytes(8, "little") + text.encode() + bytes(4))


def _nan(path: Path) -> None:
    path.write_text(path.read_text().replace('"density": 0.5', '"density": NaN'))


def _bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(50_000_000))


def _link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/null")


def cases(run: str) -> list[Case]:
    """All of them; `run` is the finished run's directory."""
    config, inspect = ["harness.py", "--config", "c.yaml"], ["utils.pruning", "inspect"]
    mask, weights = f"{run}/level_01/mask.safetensors", f"{run}/level_01/weights.safetensors"
    convert = ["utils.pruning", "convert", "p.pt", "--out", "m.safetensors"]
    huge = '{"a.weight":{"dtype":"F32","shape":[1099511627776,4],"data_offsets":[0,4]}}'
    beton = next(Path("betons").glob("digits-train-*.beton"))

    def text(content: str) -> Callable[[Path], object]:
        return lambda path: path.write_text(content)

    laughs = "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n"
    wide = {"a.weight": torch.zeros(1).expand(2**20, 2**20)}
    return [
        Case("config that asks for code", "c.yaml", text("run: {name: !!python/object/apply:os.system [x]}"), config),
        Case("config that expands itself", "c.yaml", text(laughs), config),
        Case("config nested 5,000 deep", "c.yaml", text("[" * 5000), config),
        Case("config whose run lies elsewhere", "c.yaml", text("run: {name: ../../x}\nlevels: {count: 1}"), config),
        Case("mask cut short", mask, _cut, [*inspect, mask]),
        Case("mask with a flipped bit", mask, _flip, [*inspect, mask]),
        Case("header longer than the file", mask, _put(0, 2**62), [*inspect, mask]),
        Case("shape of 16 terabytes", "h.safetensors", _header(huge), [*inspect, "h.safetensors"]),
        Case("pickle with code", "p.pt", lambda p: p.write_bytes(pickle.dumps({"a": Code()})), convert),
        Case("checkpoint with code", "p.pt", lambda p: torch.save({"a": Code()}, p), convert),
        Case("one value shaped as 4 terabytes", "p.pt", lambda p: torch.save(wide, p), convert),
        Case("archive that unpacks to 50 MB", "p.pt", _bomb, convert),
        Case("row.json with NaN", f"{run}/level_01/row.json", _nan, ["utils.reporting", "table", run]),
        Case("weights with a flipped bit", weights, _flip, ["utils.reporting", "verify", run], 1),
        Case("weights cut short", weights, _cut, ["utils.training", "evaluate", run, "--level=1"]),
        Case("link in a run directory", f"{run}/level_01/epochs.csv", _link, ["harness.py", *TINY]),
        Case(".beton: 2^60 samples", str(beton), _put(8, 2**60), BETON),
        Case(".beton: table beyond the end", str(beton), _put(16, 2**62), BETON),
        Case(".beton cut short", str(beton), _cut, BETON),
        Case(".beton with a flipped bit", str(beton), _flip, BETON),
    ]


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    words = [str(ROOT / command[0])] if command[0].endswith(".py") else ["-m", command[0]]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *words, *command[1:]], env=env, capture_output=True, text=True, timeout=300)


def _others(file: str) -> dict[str, str]:
    """Digests of all files but the bad one and the run's status."""
    found = (path for path in Path().rglob("*") if path.is_file() and not path.is_symlink())
    kept = (path for path in found if path != Path(file) and path.suffix != ".lock" and path.name != "status.json")
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in kept}


def main() -> int:
    """Run all cases in a temporary folder; print the table."""
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for command in (["harness.py", *TINY], BETON):
            done = _run(command)
            if done.returncode:
                raise SystemExit(f"{command[0]}: {done.stderr}")
        (run,) = Path("runs").iterdir()
        print("| file | read by | what the user sees | exit code | lost |\n|---|---|---|---|---|")
        for case in cases(str(run))[int(sys.argv[1]) if len(sys.argv) > 1 else 0 :]:
            path = Path(case.file)
            before = path.read_bytes() if path.exists() else None
            others = _others(case.file)
            case.make(path)
            done = _run(case.command)
            lines = (done.stdout if case.code == 1 else done.stderr).strip().splitlines() or [""]
            now = _others(case.file)
            lost = [name for name in others if now.get(name) != others[name]]
            ran = Path("code_was_run").exists()
            holds = done.returncode == case.code and not lost and not ran and len(lines) == 1
            bad += not holds
            said = lines[-1].replace(folder + "/", "").replace("|", "\\|")
            command = " ".join(case.command[:2]).replace("--data.name=digits", "").strip()
            said = f"`{said}`" if len(said) < 260 else f"`{said[:250]}...`"
            print(
                f"| {case.what} | `{command}` | {said} | {done.returncode} | {', '.join(lost) or 'nothing'} |",
                flush=True,
            )
            if not holds:
                print(json.dumps([case.what, done.returncode, ran, lost, lines[-3:]]), file=sys.stderr)
            path.unlink()
            if before is not None:
                path.write_bytes(before)
        os.chdir(ROOT)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
