"""Start and finish of a process, for entry points alone."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NoReturn

import torch

from utils.params import Params
from utils.record import fail, write_status
from utils.system import distributed, memory
from utils.system.console import Console
from utils.system.distributed import World
from utils.system.errors import EXIT_BAD_INPUT, EXIT_PREEMPTED, Busy, Preempted, UserError
from utils.system.imports import uncollected
from utils.system.launcher import Launcher
from utils.system.stopping import LAUNCHER_GONE, Never, Stopping

QUIET_SECONDS = 5.0
"""How long the ranks beside local rank 0 keep an error that the user can mend to themselves."""


@dataclass(frozen=True)
class Process:
    """What an entry point needs to know about the process it runs in."""

    world: World
    device: torch.device
    console: Console
    stopping: Never


@contextlib.contextmanager
def process(
    params: Params,
    prepare: Callable[[Params, World], None] | None = None,
    launcher: Launcher | None = None,
    own: bool = True,
) -> Iterator[Process]:
    """Run the body inside a process group that is always torn down; errors end the process, non-zero.

    prepare: what is done before the group starts; by default what training needs.
    own: whether the process is the run's own, whose errors fail the run; one that only reads it leaves it alone.

    launcher: given by a body that asks `stopping` between its steps and raises Preempted, on all ranks: one line,
    status.json says so, exit code `EXIT_PREEMPTED`. Once the group has started, the loss of the launcher, SIGTERM and
    SIGUSR1 then ask for a stop; before that, and without a launcher, signals end the process as ever.

    Wrong input is one line on stderr and exit code 2, anything else a traceback and exit code 1. A rank that fails ends
    at once: its peers wait in a collective it will never join, and torchrun stops them when it sees this one gone.
    """
    world = distributed.world()
    try:
        device = distributed.choose_device(params.run.device, world)
        _settle_torch(params)
        if device.type == "cpu":
            memory.keep_freed()
        (prepare or _prepare)(params, world)
        distributed.start(world, device, params.distributed.backend, params.distributed.timeout)
        with _heeding(launcher, device, params.distributed.timeout) as stopping:
            yield Process(world, device, Console(world.main), stopping)
        distributed.stop()
    except Preempted as stop:
        _end_preempted(params, world, str(stop))
    except Busy as error:
        _end(None, world, f"sieve: {error}", EXIT_BAD_INPUT)
    except UserError as error:
        _end(params if own else None, world, f"sieve: {error}", EXIT_BAD_INPUT)
    except KeyboardInterrupt:
        _end(params if own else None, world, "sieve: interrupted", 130)
    except Exception as error:  # the last stop of every error: report it, leave non-zero
        if _lost(error):
            _end_lost(params if own else None, world, error)
        traceback.print_exc()
        _end(params if own else None, world, f"sieve: {type(error).__name__}: {error}", 1)


@contextlib.contextmanager
def _heeding(launcher: Launcher | None, device: torch.device, timeout: float) -> Iterator[Never]:
    """Let signals and the loss of the launcher ask for a stop; without a launcher nobody asks."""
    if launcher is None:
        yield Never()
        return
    stopping = Stopping(distributed.side_group(timeout), late=device.type == "cuda")
    stopping.install()
    launcher.on_loss(functools.partial(stopping.request, LAUNCHER_GONE))
    try:
        yield stopping
    except Preempted:
        raise  # signals stay noted until status.json says so
    except BaseException:
        stopping.uninstall()  # nobody asks any more: torchrun's SIGTERM ends us at once
        raise
    stopping.drain()  # a rank that left with a question open would break it for the others
    stopping.uninstall()


def leave() -> None:
    """End a rank that is done, at once, with its output written; nothing to do without torchrun.

    What still holds the process group (a compiled module, say) would let gloo's threads abort the interpreter while it
    finalizes, and torchrun would report a finished run as failed.
    """
    if distributed.world().size > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def print_plan(params: Params) -> None:
    """Print what the config would do, on rank 0; nothing is written."""
    from utils.estimate import describe

    world = distributed.world()
    if not world.main:
        return
    try:
        print(describe(params, world))
    except UserError as error:
        print(f"sieve: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)


def _prepare(params: Params, world: World) -> None:
    from utils import data, models
    from utils.feasibility import check_method
    from utils.params.checks import check_ranks
    from utils.waiting import wait_for_source

    check_ranks(params, world.size)
    with uncollected(forever=True):  # models and methods are imported where they are first looked up
        models.check_name(params.model.name)
        check_method(params)
    wait_for_source(params, world)
    # Before the process group starts: writing .beton files can outlast any sensible collective timeout.
    data.prepare(params)


def _settle_torch(params: Params) -> None:
    if params.run.threads is not None:
        torch.set_num_threads(params.run.threads)
    # float32 means float32; those who want speed take bfloat16.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = not params.run.deterministic
    if params.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def _end_preempted(params: Params, world: World, message: str) -> None:
    """Write the state down before any rank leaves: torchrun ends the others as soon as one is gone."""
    try:
        distributed.from_main(functools.partial(write_status, params, "preempted", reason=message))
    except Exception as error:  # the state is stored; that status.json does not say so is all that is lost
        print(f"sieve: status.json: {error}", file=sys.stderr)
    if world.main:
        print(f"sieve: {message}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(EXIT_PREEMPTED)


def _lost(error: Exception) -> bool:
    """Whether a collective failed because another rank is gone, or does not answer."""
    signs = (
        "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting",
        "Application timeout caused pair closure",
    )  # fmt: skip
    return isinstance(error, RuntimeError) and any(sign in f"{error}" for sign in signs)


def _end_lost(params: Params | None, world: World, error: Exception) -> NoReturn:
    """End a rank that lost another: in one line, and only where no launcher stops it first, for the lost one's own
    words are what matters."""
    reason = f"{error}".strip().rpartition("] ")[2].partition("\n")[0].rstrip(".")
    message = (
        f"sieve: rank {world.rank} lost another rank ({reason}); the same command goes on from the last checkpoint"
    )
    if params is not None:
        with contextlib.suppress(OSError, UserError):
            fail(params, message)
    time.sleep(QUIET_SECONDS)
    print(message, file=sys.stderr, flush=True)
    os._exit(1)


def _end(params: Params | None, world: World, message: str, code: int) -> None:
    if code == EXIT_BAD_INPUT and world.local_rank > 0:
        # What is wrong for all is told by local rank 0; torchrun ends this process when that one is gone. What is
        # wrong here alone is told a moment later.
        time.sleep(QUIET_SECONDS)
    prefix = f"[rank {world.rank}] " if world.local_rank > 0 else ""
    print(prefix + message, file=sys.stderr, flush=True)
    if params is not None:  # the state of a run that another process is at work on is its to tell
        with contextlib.suppress(OSError, UserError):
            fail(params, message)
    sys.stdout.flush()
    # Not sys.exit: leaving the group or joining a loader's thread can wait for a peer that waits for us.
    os._exit(code)
