"""`Extension`: what acts during training without being part of the trainer."""

from __future__ import annotations

from torch import Tensor

from utils.masks import Masks


class Extension:
    """Base class with a no-op for every call; an extension overrides what it needs.

    Contract. The trainer makes every call on all ranks alike, in the order the extensions were given; an extension
    that decides something must decide the same on every rank (reduce what it decides from first). `step` counts the
    optimizer steps of the level's schedule from 0; a level that continues the schedule of an earlier step begins there.
    For each optimizer step, whatever the accumulation:

    1. `needs_dense_grad(step)` of every extension;
    2. `before_step(step)`, before the forward pass; masks may change here;
    3. forward, backward, `after_backward(step)` and the optimizer's step; pruned weights are 0.0 again;
    4. `after_step(step)`, with the same number.

    Where `replaces_step(step)` is true of an extension, its `update(step)` is called instead of the optimizer's step
    in 3, and it gets no `after_step` for this step; the others do. Gradients are then those of the whole step: averaged
    over micro-batches and ranks, without a loss scale, not clipped. If any extension asked for dense gradients they
    hold those of pruned weights too, and may be infinite or NaN where half precision overflowed. Nothing is stepped:
    weights outside the change of masks, optimizer state and its counters stay, the learning rate is not used, and the
    gradients are cleared. Should several extensions replace one step, all updates run. Dense gradients are for updates
    alone: at a step that nothing replaces they are masked before anything is made of them. Only `after_backward` and
    `update` may read gradients.

    `epoch_end` follows the last step of an epoch, after BatchNorm statistics were averaged over the ranks and before
    evaluation; masks may change here. `masks_changed` follows every change of masks (`masking.change_masks`), once
    weights and optimizer state are projected. None of them may wait for the device at every step. `state` and
    `load_state` make a resumed run go on bit for bit: whatever a later call depends on, and that is neither the
    model's nor a function of the step, belongs there.
    """

    def needs_dense_grad(self, step: int) -> bool:
        """Whether the gradients of this step must be left unmasked, so that pruned weights show theirs."""
        return False

    def replaces_step(self, step: int) -> bool:
        """Whether `update` takes the place of the optimizer's step: a pure function of the step."""
        return False

    def reads_gradients(self, step: int) -> bool:
        """Whether `after_backward` reads gradients of masked parameters at this step.

        Where nobody does they may show pruned weights' gradients in it, which the optimizer's step then leaves out.
        """
        return type(self).after_backward is not Extension.after_backward

    def update(self, step: int) -> None:
        """Called in place of the optimizer's step, after backward; see the contract."""

    def before_step(self, step: int) -> None:
        """Called before the forward pass of the step."""

    def after_backward(self, step: int) -> None:
        """Called once the gradients of the whole step are there: averaged over ranks, scaled, not yet clipped."""

    def after_step(self, step: int) -> None:
        """Called after the optimizer's step, or after another extension's update in its place."""

    def epoch_end(self, epoch: int) -> dict[str, float | None]:
        """Called after the epoch's last step; returns columns for its row (none by default); None is an empty cell."""
        return {}

    def masks_changed(self, masks: Masks) -> None:
        """Called after every change of masks, with the new ones."""

    def close(self) -> None:
        """Called when the level has trained, on all ranks: leave the model and the task as without the extension."""

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold: CPU tensors by name, contiguous, that share no memory with the live ones."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` returned. Raises UserError when it is another model's."""
