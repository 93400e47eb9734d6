"""One pass over a list of batches: a thread runs FFCV's pipeline ahead of the reader, and always ends.

FFCV's own iterator waits for ever when its pipeline raises, leaves its thread and buffers behind when it is not read to
the end, and may write into pinned memory that a GPU copy still reads. Here buffers are handed back and forth: the
thread fills free slots, the reader frees a slot once its batch is copied out, an error travels to the reader like a
batch, and `close` ends thread and page readers at once.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import torch

from utils.data.ffcv_ops import COLUMNS, FAILED, OFFSET
from utils.data.ffcv_pipeline import Pipeline
from utils.data.protocol import Batch
from utils.system.errors import UserError

SLOTS = 4
"""Batches that exist at a time: the one being read and those made ahead of it."""

POLL_SECONDS = 2.0
"""How often a waiting reader looks whether anything still works for it."""

CLOSE_SECONDS = 30.0
"""How long `close` waits for the batch in hand."""

_kernel = threading.Lock()
"""Held while the kernel runs on several threads: not all of numba's threading layers allow two such calls at once."""


@dataclass
class Job:
    """What an epoch does.

    batches        sample indices of each batch, int64
    plan           (sample indices [B]) -> plan rows [B, COLUMNS], offsets being places in the file; runs in the thread
    largest        bytes of the largest decoded image
    pad            padding the shifts of the plan refer to; below 0: none
    canvas         side of the image that is shifted; 1 where nothing is
    ways           how JPEGs are decoded and who resizes (`ffcv_native.ways`)
    """

    batches: list[np.ndarray]
    plan: Callable[[np.ndarray], np.ndarray]
    largest: int
    ways: tuple[int, int]
    pad: int = -1
    canvas: int = 1


@dataclass
class Slot:
    """Buffers of one batch, and on a GPU the stream that copies it and the events both sides wait for."""

    memory: dict[str, dict[int, Any]]
    plan: np.ndarray
    stream: torch.cuda.Stream | None = None
    copied: torch.cuda.Event | None = None
    read: torch.cuda.Event | None = None
    outputs: tuple[torch.Tensor, ...] = ()


class EpochReader:
    """One pass over a job's batches: `read` it once, then `close` it, whatever happened."""

    def __init__(self, pipeline: Pipeline, job: Job, device: torch.device, workers: int) -> None:
        self.pipeline, self.job, self.device, self.workers = pipeline, job, device, workers
        canvas = (workers, job.canvas, job.canvas, 3)
        decoded = np.empty((workers, job.largest), np.uint8)
        self._scratch = (decoded, np.empty(canvas, np.uint8), np.empty(canvas, np.uint8))
        self._free: queue.SimpleQueue[Slot | None] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[Slot | BaseException | None] = queue.SimpleQueue()
        self._slots = list(self._make_slots())
        for slot in self._slots:
            self._free.put(slot)
        self._stop = threading.Event()
        self._context = pipeline.memory_manager.schedule_epoch(job.batches)
        self._context.__enter__()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="sieve-ffcv", daemon=True)
        self._thread.start()

    def _make_slots(self) -> Iterator[Slot]:
        rows = max(len(batch) for batch in self.job.batches)
        memory = self.pipeline.graph.allocate_memory(rows, SLOTS)
        for place in range(SLOTS):
            own = {
                kind: {node: _part(buffer, place) for node, buffer in buffers.items()}
                for kind, buffers in memory.items()
            }
            slot = Slot(own, np.zeros((rows, COLUMNS), np.int64))
            if self.device.type == "cuda":
                slot.stream = torch.cuda.Stream(self.device)
                # The memory may have been freed a moment ago by work that is still to run on the reader's stream.
                slot.read = torch.cuda.current_stream(self.device).record_event()
            yield slot

    def read(self, copy: Callable[[int, torch.Tensor, torch.Tensor], Batch]) -> Iterator[Batch]:
        """Yield `copy(number, images, labels)` for every batch: images uint8 [B, S, S, 3], labels int64 [B, 1].

        Both are on the device and hold something else as soon as `copy` has returned.
        Raises, at the batch where it happened, whatever the pipeline raised: UserError for an image that is damaged.
        """
        number = 0
        while True:
            got = self._wait()
            if got is None:
                return
            if isinstance(got, BaseException):
                raise got
            if got.stream is not None:
                torch.cuda.current_stream(self.device).wait_stream(got.stream)
            batch = copy(number, *got.outputs)
            got.outputs = ()
            if got.stream is not None:
                # What `copy` launched comes before the next copy into these buffers.
                got.read = torch.cuda.current_stream(self.device).record_event()
            self._free.put(got)
            yield batch
            number += 1

    def _wait(self) -> Slot | BaseException | None:
        while True:
            if self._closed:
                raise RuntimeError(f"{self.pipeline.file}: the loader was closed while an epoch was being read")
            with contextlib.suppress(queue.Empty):
                return self._ready.get(timeout=POLL_SECONDS)
            if not self._thread.is_alive() and self._ready.empty():
                raise RuntimeError(f"{self.pipeline.file}: the reading thread ended without a word")
            if any(not reader.is_alive() for reader in self._page_readers()):
                raise RuntimeError(f"{self.pipeline.file}: a page reader died (is the file still there?); see above")

    def _page_readers(self) -> list[threading.Thread]:
        executor = getattr(self._context, "executor", None)
        return list(getattr(executor, "threads", ()))

    def _run(self) -> None:
        try:
            numba.set_num_threads(self.workers)
            for number, batch in enumerate(self.job.batches):
                slot = self._free.get()
                if slot is None or self._stop.is_set():
                    return
                self._fill(slot, number, batch)
                self._ready.put(slot)
            self._ready.put(None)
        except BaseException as error:  # handed to the reader, who raises it
            self._ready.put(error)

    def _fill(self, slot: Slot, number: int, batch: np.ndarray) -> None:
        self._context.start_batch(number)
        if slot.copied is not None:
            slot.copied.synchronize()  # the copy to the GPU still reads the buffers we are about to fill
        count = len(batch)
        plan = slot.plan[:count]
        plan[:] = self.job.plan(batch)
        storage = self._storage(plan)
        arguments: dict[str, Any] = {
            "batch_indices": batch,
            "storage_state": self._context.state,
            "metadata": self.pipeline.reader.metadata,
        }
        for kind, prefix in (("operation", "memory"), ("shared", "shared_memory")):
            for node, buffer in slot.memory.get(kind, {}).items():
                arguments[f"{prefix}_{node}"] = None if buffer is None else buffer[:count]
        decoder = f"memory_{self.pipeline.node(self.pipeline.decoder)}"
        arguments[decoder] = (arguments[decoder], plan, (self.job.pad, *self.job.ways), storage, *self._scratch)
        slot.outputs = self._through_stages(slot, arguments)
        failed = np.flatnonzero(plan[:, FAILED])
        if len(failed):
            sample = int(batch[failed[0]])
            raise UserError(
                f"{self.pipeline.file}: image {sample} is damaged; delete the file to have it written again"
            )

    def _storage(self, plan: np.ndarray) -> np.ndarray:
        """The bytes images are read from, read-only uint8 [n]; the plan's offsets become places in them."""
        state = self._context.state
        if len(state) == 3:  # the mapped file
            return np.asarray(state[0])
        pages, _, _, slot_of = state
        page, within = np.divmod(plan[:, OFFSET], pages.shape[1])
        plan[:, OFFSET] = slot_of[page].astype(np.int64) * pages.shape[1] + within
        flat: np.ndarray = pages.reshape(-1)
        flat.flags.writeable = False  # one type for both kinds, so that the kernel is compiled once
        return flat

    def _through_stages(self, slot: Slot, arguments: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        guard: Any = torch.cuda.stream(slot.stream) if slot.stream is not None else contextlib.nullcontext()
        with guard:
            if slot.stream is not None and slot.read is not None:
                slot.stream.wait_event(slot.read)
            for place, (stage, defined) in enumerate(self.pipeline.stages):
                # Even stages are the decoders', odd ones torch's.
                with _kernel if place % 2 == 0 and self.workers > 1 else contextlib.nullcontext():
                    results = stage(**arguments)
                arguments.update({f"result_{node}": result for node, result in zip(defined, results, strict=True)})
            if slot.stream is not None:
                slot.copied = slot.stream.record_event()
        return tuple(arguments[f"result_{self.pipeline.leaf(name)}"] for name in ("image", "label"))

    def close(self) -> None:
        """End the thread after the batch in hand, and the page readers; give the buffers back. Does nothing twice."""
        if self._closed:
            return
        self._closed = True
        self._stop.set()
        self._free.put(None)
        readers = self._page_readers()
        if not all(reader.is_alive() for reader in readers):
            for page in self._context.schedule.page_to_slot:  # the thread may wait for pages that nobody will read
                self._context.executor.loaded_queue.put(page)
        self._thread.join(CLOSE_SECONDS)
        self._context.__exit__(None, None, None)
        for reader in readers:
            reader.join(CLOSE_SECONDS)
        for slot in self._slots:
            if slot.stream is not None:
                slot.stream.synchronize()  # memory goes back to torch's pools only when no copy uses it
        self._slots = []


def _part(buffer: Any, place: int) -> Any:
    """The part of FFCV's buffers (one array, a list of tensors, or a tuple of those) that belongs to a slot."""
    if buffer is None:
        return None
    if isinstance(buffer, tuple):
        return tuple(_part(one, place) for one in buffer)
    return buffer[place]
