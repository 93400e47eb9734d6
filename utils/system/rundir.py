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
    def rewind(self) -> Path:
        """Weights and optimizer state of the rewind step (safetensors)."""
        return self.path / "rewind.safetensors"

    @property
    def checkpoint(self) -> Path:
        """State inside the level (safetensors)."""
        return self.path / "checkpoint.safetensors"

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
