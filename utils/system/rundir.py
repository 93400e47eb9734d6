"""The run directory: every file name of a run, in one place."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class LevelDir:
    """The files of one level."""

    path: Path

    @property
    def mask(self) -> Path:
        """Masks of the level's weights: those it trained with, and ended with (safetensors)."""
        return self.path / "mask.safetensors"

    @property
    def start_mask(self) -> Path:
        """Masks training began with, where it changes them (safetensors)."""
        return self.path / "start_mask.safetensors"

    @property
    def rounds(self) -> Path:
        """One row per round of the level's pruning: density asked for and reached."""
        return self.path / "rounds.csv"

    @property
    def layers(self) -> Path:
        """One row per parameter: shape, kept, density, dead."""
        return self.path / "layers.csv"

    @property
    def epochs(self) -> Path:
        """One row per epoch."""
        return self.path / "epochs.csv"

    @property
    def weights(self) -> Path:
        """Last raw weights and buffers under the stock model's keys (safetensors)."""
        return self.path / "weights.safetensors"

    @property
    def average(self) -> Path:
        """Averaged weights, when training.ema is set (safetensors)."""
        return self.path / "average.safetensors"

    @property
    def widths(self) -> Path:
        """Widths of a network made smaller, from which the stock constructor rebuilds it (JSON)."""
        return self.path / "widths.json"

    @property
    def origin(self) -> Path:
        """Digest of the weights a structured level started from."""
        return self.path / "origin.txt"

    @property
    def gates(self) -> Path:
        """Gates learned per group of channels (safetensors)."""
        return self.path / "gates.safetensors"

    @property
    def onnx(self) -> Path:
        """The level's network as `--export onnx` writes it."""
        return self.path / "model.onnx"

    @property
    def rewind(self) -> Path:
        """Weights and optimizer state of the rewind step (safetensors)."""
        return self.path / "rewind.safetensors"

    @property
    def checkpoint(self) -> Path:
        """Newest state inside the level (safetensors); gone once the level is done, unless run.keep says otherwise."""
        return self.path / "checkpoint.safetensors"

    @property
    def previous(self) -> Path:
        """The checkpoint before the newest one."""
        return self.path / "checkpoint.previous.safetensors"

    def checkpoint_of(self, epoch: int) -> Path:
        """The state after `epoch` (counted from 1), with run.keep=all."""
        return self.path / f"checkpoint_{epoch:04d}.safetensors"

    @property
    def best(self) -> Path:
        """Weights of the epoch with the best validation accuracy, with run.keep=best (safetensors)."""
        return self.path / "best.safetensors"

    @property
    def status(self) -> Path:
        """State of a process that runs this level alone, as status.json is that of one that runs the plan."""
        return self.path / "status.json"

    @property
    def gradients(self) -> Path:
        """Gradient norms per parameter over the first steps, when training.gradient_norms is set."""
        return self.path / "gradients.csv"

    @property
    def row(self) -> Path:
        """The level's row of levels.csv; written last, so its presence means the level is done."""
        return self.path / "row.json"


@dataclass(frozen=True)
class RunDir:
    """The files of one run."""

    path: Path

    @property
    def config(self) -> Path:
        """Parameters as given; passed back as --config it names the same run."""
        return self.path / "config.yaml"

    @property
    def environment(self) -> Path:
        """Versions, hardware, what `auto` became, digests of inputs."""
        return self.path / "environment.json"

    @property
    def status(self) -> Path:
        """running, preempted, failed or done."""
        return self.path / "status.json"

    def status_of(self, level: int | None) -> Path:
        """Where a process writes its state: one that runs `level` alone has a file of its own."""
        return self.status if level is None else self.level(level).status

    @property
    def levels_csv(self) -> Path:
        """One row per finished level."""
        return self.path / "levels.csv"

    @property
    def plot(self) -> Path:
        """Test accuracy against density."""
        return self.path / "levels.png"

    def level(self, number: int) -> LevelDir:
        """The folder of level `number`."""
        return LevelDir(self.path / f"level_{number:02d}")

    def levels(self) -> list[int]:
        """Numbers of the level folders that exist, ascending."""
        if not self.path.is_dir():
            return []
        found = (re.fullmatch(r"level_(\d{2,})", entry.name) for entry in self.path.iterdir() if entry.is_dir())
        return sorted(int(match[1]) for match in found if match)


def planted_links(run: RunDir) -> list[Path]:
    """Symbolic links among a run's files and level folders: whatever is written through one lies outside the run."""
    inside = [run.path, *(run.level(number).path for number in run.levels())]
    found = {entry for folder in inside if folder.is_dir() for entry in folder.iterdir() if entry.is_symlink()}
    return sorted(found)
