"""Checkpoints inside a level: the whole state of training, put back bit for bit.

numpy's and Python's generators are not in it: nothing in training draws from them.
"""

from __future__ import annotations

import functools
import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils import files, params
from utils.data.stateless import derive
from utils.masks import Masks
from utils.system import distributed
from utils.system.atomic import replacing
from utils.system.console import Console
from utils.system.distributed import World
from utils.system.errors import UserError
from utils.system.rundir import LevelDir
from utils.training.averaging import ExponentialAverage
from utils.training.optimizers import load_optimizer_state, optimizer_state
from utils.training.progress import Keeper, Live, Progress, of_stock_network
from utils.training.snapshot import PROGRESS, Snapshot, read, write


class Checkpoints(Keeper):
    """The checkpoints of one level. Call `find` before training; hand it to `Trainer.fit`."""

    def __init__(
        self,
        place: LevelDir,
        section: params.Run,
        model: nn.Module,
        *,
        level: int,
        key: str,
        world: World,
        console: Console,
        check: Callable[[], object] = lambda: None,
    ) -> None:
        """key: digest of what the level begins with; a checkpoint of another beginning is not used.

        model: the bare model. check: called on rank 0 before a file is written; raises when the level is not ours.
        """
        self.place, self.section, self.model = place, section, model
        self.level, self.key, self.world, self.console, self.check = level, key, world, console, check
        self.notes: Callable[[], dict[str, Any]] = dict
        """What the driver wants back after a resume, as JSON; asked at every checkpoint."""
        self.snapshot: Snapshot | None = None
        self._saved = time.monotonic()
        self._last: str | None = None

    # Reading ------------------------------------------------------------------------------------------------------

    def find(self) -> Snapshot | None:
        """The newest whole checkpoint of this beginning; None where there is none and the stage starts afresh.

        A file that is damaged, or of another beginning, is named and set aside, and the one before it is tried.
        """
        chosen = distributed.from_main(self._choose)
        self.snapshot = None if chosen is None else read(chosen)
        return self.snapshot

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Rows of the epochs that `restore` will not train again."""
        return [] if self.snapshot is None else list(self.snapshot.facts["rows"])

    def _choose(self) -> Path | None:
        for path in (self.place.checkpoint, self.place.previous):
            if not path.is_file():
                continue
            try:
                snapshot = read(path)
                reason = None if snapshot.facts["key"] == self.key else "it belongs to other weights or masks"
            except UserError as error:
                reason = str(error).removeprefix(f"{path}: ")
            if reason is None:
                return path
            aside = _set_aside(path)
            self.console.warn(f"{path}: {reason}; set aside as {aside.name}")
        return None

    def restore(self, live: Live) -> bool:
        """Put the state that `find` found into the model and `live`; False without one.

        Raises UserError when it is another model's, optimizer's or method's.
        """
        snapshot = self.snapshot
        if snapshot is None:
            return False
        self.snapshot = None
        facts = snapshot.facts
        _put(self.model, live, snapshot)
        progress = live.progress
        for name in PROGRESS:
            setattr(progress, name, facts[name])
        same = facts["ranks"] == self.world.size
        if same:
            self._put_own(progress, snapshot)
        else:
            self._share(progress, snapshot, facts["ranks"])
        stored = "" if same else f" (stored by {_ranks(facts['ranks'])}: not bit for bit on {_ranks(self.world.size)})"
        self._last = _where(self.level, progress)
        self.console.line(f"resumed {self._last}{stored}")
        return True

    def _put_own(self, progress: Progress, snapshot: Snapshot) -> None:
        own = snapshot.part(f"rank{self.world.rank}.")
        buffers = dict(self.model.named_buffers())
        for name, value in own.items():
            if name.startswith("buffer."):
                _copy_buffer(buffers, name.removeprefix("buffer."), value, snapshot.path)
        progress.totals = own.get("totals")
        torch.set_rng_state(own["rng"])
        if "device_rng" in own and torch.cuda.is_available():
            torch.cuda.set_rng_state(own["device_rng"])

    def _share(self, progress: Progress, snapshot: Snapshot, ranks: int) -> None:
        """What the ranks had each on their own, for another number of ranks: sums go to rank 0, buffers are averaged.

        The random state is drawn anew: a function of where training is and of the rank.
        """
        torch.manual_seed(derive("resumed", self.key, progress.step, self.world.rank))
        totals = [snapshot.tensors[name] for r in range(ranks) if (name := f"rank{r}.totals") in snapshot.tensors]
        if totals:
            whole = torch.stack(totals).sum(0)
            progress.totals = whole if self.world.rank == 0 else torch.zeros_like(whole)
        buffers = dict(self.model.named_buffers())
        for name in snapshot.part("rank1.buffer."):
            each = [snapshot.tensors[f"rank{r}.buffer.{name}"] for r in range(1, ranks)]
            each.append(snapshot.tensors[f"model.{name}"])
            mean = torch.stack([value.double() for value in each]).mean(0)
            _copy_buffer(buffers, name, mean, snapshot.path)

    # Writing ------------------------------------------------------------------------------------------------------

    def due(self) -> bool:
        """Whether `run.checkpoint_minutes` have passed since the last one."""
        minutes = self.section.checkpoint_minutes
        return minutes is not None and time.monotonic() - self._saved >= 60.0 * minutes

    def epoch_done(self, live: Live) -> None:
        """Store what `run.checkpoint_epochs` and `run.keep` ask for."""
        rows, every = live.progress.rows, self.section.checkpoint_epochs
        if self.section.keep == "best" and _is_best(rows):
            self._save_best(live)
        if every is not None and len(rows) and live.progress.epoch % every == 0:
            self.save(live)
            if self.section.keep == "all":
                kept = self.place.checkpoint_of(live.progress.epoch)
                distributed.from_main(functools.partial(_copy, self.place.checkpoint, kept))

    def save(self, live: Live) -> str:
        """Store the state between two steps. Returns where training would go on, in words.

        The new file is read back before it takes its place, and the one before it is kept. Raises UserError on every
        rank when some weight is NaN or infinite (nothing is written), or when the file cannot be written.
        """
        own = distributed.gather(self._own(live))
        states = [extension.state() for extension in live.extensions]
        distributed.from_main(functools.partial(self._write, live, own, states))
        self._saved = time.monotonic()
        self._last = _where(self.level, live.progress)
        return self._last

    def last(self) -> str:
        """The last state stored, in words."""
        return "no checkpoint yet" if self._last is None else f"the last checkpoint is of {self._last}"

    def remove(self) -> None:
        """Remove what only a level that is not done needs. Rank 0 calls it once the row is written."""
        if self.section.keep != "all":
            remove(self.place)

    def _own(self, live: Live) -> dict[str, Tensor]:
        own = {"rng": torch.get_rng_state()}
        if torch.cuda.is_available():
            own["device_rng"] = torch.cuda.get_rng_state()
        if live.progress.totals is not None:
            own["totals"] = live.progress.totals.detach().cpu().clone()
        if self.world.rank > 0:
            own |= {f"buffer.{n}": b.detach().cpu().contiguous().clone() for n, b in _buffers(self.model).items()}
        return own

    def _write(self, live: Live, own: list[dict[str, Tensor]], states: list[dict[str, Tensor]]) -> None:
        self.check()
        tensors: dict[str, Tensor] = {f"model.{name}": t for name, t in files.state_of(self.model).items()}
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                where = f"level {self.level}, step {live.progress.step}"
                raise UserError(
                    f"{where}: {name.removeprefix('model.')!r} is not finite; {self.last()}; "
                    "lower optimizer.lr, add schedule.warmup or training.clip"
                )
        tensors |= {f"optimizer.{n}": t for n, t in optimizer_state(self.model, live.optimizer).items()}
        tensors |= {f"mask.{name}": mask for name, mask in live.sparsity.masks.items()}
        for index, state in enumerate(states):
            tensors |= {f"extension.{index}.{name}": t for name, t in state.items()}
        for rank, part in enumerate(own):
            tensors |= {f"rank{rank}.{name}": t for name, t in part.items()}
        facts = {name: getattr(live.progress, name) for name in PROGRESS}
        facts |= {
            "level": self.level,
            "key": self.key,
            "ranks": self.world.size,
            "scaler": live.scaler.state_dict(),
            "extensions": [type(extension).__name__ for extension in live.extensions],
            "notes": self.notes(),
        }
        write(self.place.checkpoint, self.place.previous, tensors, facts)

    def _save_best(self, live: Live) -> None:
        averages = [e for e in live.extensions if isinstance(e, ExponentialAverage)]
        epoch = str(live.progress.epoch)

        def save() -> None:
            self.check()
            files.save_weights(self.place.best, self.model, mask_digest=live.sparsity.masks.digest, epoch=epoch)

        if averages:
            with averages[0].swapped():
                distributed.from_main(save)
        else:
            distributed.from_main(save)


def remove(place: LevelDir) -> None:
    """Remove the checkpoints of a level that is done."""
    for path in (place.checkpoint, place.previous):
        path.unlink(missing_ok=True)


def _put(model: nn.Module, live: Live, snapshot: Snapshot) -> None:
    """Masks, extensions, weights, optimizer state and loss scale: what all ranks share."""
    kinds = [type(extension).__name__ for extension in live.extensions]
    if snapshot.facts["extensions"] != kinds:
        raise UserError(f"{snapshot.path}: made with {snapshot.facts['extensions']}, this run has {kinds}; remove it")
    masks = Masks(snapshot.part("mask."))
    masks.check(model)
    live.sparsity.set(masks)
    for index, extension in enumerate(live.extensions):
        extension.load_state(snapshot.part(f"extension.{index}."))
    files.put_weights(model, snapshot.part("model."), str(snapshot.path))
    load_optimizer_state(model, live.optimizer, snapshot.part("optimizer."))
    if live.scaler.is_enabled():
        live.scaler.load_state_dict(dict(snapshot.facts["scaler"]))
    if violations := live.sparsity.violations():
        raise UserError(f"{snapshot.path}: pruned weights of {violations[0]!r} are not 0.0; remove it")


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """Floating-point buffers that are saved with the weights: those whose values may differ over the ranks."""
    kept = files.state_of(model)
    return {name: b for name, b in model.named_buffers() if name in kept and b.is_floating_point()}


@torch.no_grad()
def _copy_buffer(buffers: Mapping[str, Tensor], name: str, value: Tensor, path: Path) -> None:
    if name not in buffers or buffers[name].shape != value.shape:
        raise UserError(f"{path}: buffer {name!r} is not this model's; remove it")
    buffers[name].copy_(value)


def _is_best(rows: list[dict[str, Any]]) -> bool:
    """Whether the last epoch is the first with the best validation accuracy of the stock network."""
    scores = [row.get("val_acc") if of_stock_network(row) else None for row in rows]
    own = scores[-1] if scores else None
    return own is not None and all(score is None or score < own for score in scores[:-1])


def _where(level: int, progress: Progress) -> str:
    return f"level {level} epoch {progress.epoch} step {progress.step}"


def _ranks(count: int) -> str:
    return f"{count} rank" if count == 1 else f"{count} ranks"


def _set_aside(path: Path) -> Path:
    stem = re.sub(r"\.safetensors$", "", path.name)
    taken = range(1, 10_000)
    aside = next(p for n in taken if not (p := path.with_name(f"{stem}.broken-{n}.safetensors")).exists())
    os.replace(path, aside)
    return aside


def _copy(source: Path, target: Path) -> None:
    with replacing(target) as temporary:
        temporary.write_bytes(source.read_bytes())
