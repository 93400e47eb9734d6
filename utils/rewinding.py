"""Rewinding: the weights and the step a level trains from."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from utils import files
from utils.params import Params
from utils.params.plan import SINGLE, Level
from utils.system import distributed
from utils.system.errors import UserError
from utils.system.rundir import RunDir
from utils.training.optimizers import load_optimizer_state, optimizer_state
from utils.training.schedules import lr_at
from utils.training.trainer import Trainer

State = Mapping[str, torch.Tensor]


class Rewinding:
    """Captures the rewind point while the dense level 0 trains and puts weights back for the levels after it.

    imp (Frankle and Carbin 2019): initial weights, full schedule. wr (Frankle et al. 2020): weights of `rewind_step`,
    whose schedule continues, or restarts by option. lrr (Renda et al. 2020): the pruned level's weights, full schedule.
    none: the pruned level's weights, fine-tuned at the final rate. BatchNorm statistics follow their weights.
    """

    def __init__(self, params: Params, trainer: Trainer, run: RunDir) -> None:
        self.levels = params.levels
        self.trainer = trainer
        self.file = run.level(0).rewind
        self.captures = rewinds_to_step(params)

    @property
    def step(self) -> int:
        """The rewind step, in optimizer steps."""
        assert self.levels.rewind_step is not None
        return self.levels.rewind_step.at(self.trainer.steps_per_epoch)

    def marks(self, level: Level, optimizer: torch.optim.Optimizer) -> dict[int, Callable[[], None]]:
        """What the trainer calls at which step of `level`: level 0 stores the rewind point."""
        if not self.captures or level.number != 0:
            return {}

        def capture() -> None:
            state = self.trainer.averaged_state()
            distributed.from_main(lambda: self._save(state, optimizer))

        return {self.step: capture}

    def _save(self, state: State, optimizer: torch.optim.Optimizer) -> None:
        moments = optimizer_state(self.trainer.model, optimizer)
        tensors = {f"model.{k}": v for k, v in state.items()} | {f"optimizer.{k}": v for k, v in moments.items()}
        files.save_tensors(self.file, tensors, {"step": str(self.step)})

    def restore(self, level: Level, initial: State, source: State, optimizer: torch.optim.Optimizer) -> int:
        """Put the weights `level` trains from into the model. Returns the step its schedule starts at.

        initial: the run's initial weights; source: those of the level it pruned.
        """
        if level.rewind in (None, "imp"):
            files.put_weights(self.trainer.model, initial)
        elif level.rewind in ("lrr", "none"):
            files.put_weights(self.trainer.model, source)
        else:
            return self._to_step(optimizer)
        return 0

    def _to_step(self, optimizer: torch.optim.Optimizer) -> int:
        mend = f"delete {self.file.parent} and run level 0 again"
        if not distributed.exists(self.file):
            raise UserError(f"{self.file}: missing, levels.rewind=wr starts from it; {mend}")
        stored, metadata = files.load_tensors(self.file)
        if metadata.get("step") != str(self.step):
            raise UserError(f"{self.file}: holds step {metadata.get('step')}, not {self.step}; {mend}")
        files.put_weights(self.trainer.model, _part(stored, "model."), str(self.file))
        if self.levels.rewind_optimizer:
            load_optimizer_state(self.trainer.model, optimizer, _part(stored, "optimizer."))
        return self.step if self.levels.rewind_schedule == "continue" else 0


def rate_of(params: Params, plan: list[Level], level: Level, steps_per_epoch: int) -> Callable[[int], float]:
    """The learning rate of `level` as a function of the step: the schedule, or for `none` its last value."""
    total = level.epochs * steps_per_epoch

    def scheduled(step: int) -> float:
        return lr_at(step, params.schedule, params.optimizer.lr, total, steps_per_epoch)

    if level.rewind != "none":
        return scheduled
    first = plan[0].epochs * steps_per_epoch
    final = params.levels.finetune_lr
    if final is None:
        final = lr_at(max(first - 1, 0), params.schedule, params.optimizer.lr, first, steps_per_epoch)
    return lambda step: final


def rewinds_to_step(params: Params) -> bool:
    """Whether some level returns to a step of level 0."""
    return params.levels.rewind == "wr" and params.pruning.moment not in SINGLE


def check_rewind(params: Params, plan: list[Level], steps_per_epoch: int) -> None:
    """Raise UserError when some level would have nothing left to train after the rewind step."""
    step = params.levels.rewind_step
    if not rewinds_to_step(params) or step is None or len(plan) < 2:
        return
    total = min(level.epochs for level in plan) * steps_per_epoch
    if step.at(steps_per_epoch) >= total:
        raise UserError(f"levels.rewind_step={step}: training has only {total} steps; choose an earlier step")


def _part(tensors: State, prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
