"""The FFCV loader: threads and their ends, errors, closing. Small files, few loaders; all in one process."""

from __future__ import annotations

import gc
import threading
import time

import numpy as np
import pytest
import torch

pytestmark = [pytest.mark.ffcv, pytest.mark.xdist_group("ffcv")]

pytest.importorskip("ffcv", reason="FFCV is not installed")

from tests.data import ffcv_cases  # noqa: E402
from tests.data.ffcv_cases import SAMPLES, load, read, run, same, spec_of  # noqa: E402
from utils.data import ffcv_epoch, ffcv_loader  # noqa: E402
from utils.data.order import Shard  # noqa: E402
from utils.system.cpus import allowed_cpus  # noqa: E402
from utils.system.errors import UserError  # noqa: E402


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return ffcv_cases.write_files(tmp_path_factory.mktemp("betons"))


def own_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread is not threading.main_thread() and thread.is_alive()]


@pytest.mark.parametrize("os_cache", [True, False])
def test_a_partial_read_leaves_no_thread(files, os_cache):
    before = own_threads()
    loader = load(files, "square", spec_of(os_cache=os_cache))
    for _ in range(3):
        for _, _ in loader:
            break
    assert own_threads() == before
    open_one = iter(loader)
    next(open_one)
    other = iter(loader)
    next(other)
    assert len(own_threads()) > len(before)
    loader.close()
    assert own_threads() == before
    loader.close()
    assert len(read(loader)) == len(loader)
    never_started = iter(loader)
    del open_one, other, never_started
    gc.collect()
    assert own_threads() == before


def test_a_partial_read_ends_with_the_batch_in_hand(files, monkeypatch):
    loader, original, calls = load(files, "square", spec_of()), ffcv_loader.augment.crop_offsets, []

    def slowly(*arguments):
        calls.append(arguments)
        if len(calls) > 1:
            time.sleep(0.5)
        return original(*arguments)

    monkeypatch.setattr(ffcv_loader.augment, "crop_offsets", slowly)
    for _, _ in loader:
        break
    assert len(calls) <= 3


def test_reading_on_after_close_is_an_error(files):
    loader = load(files, "square", spec_of())
    batches = iter(loader)
    next(batches)
    loader.close()
    with pytest.raises(RuntimeError, match="was closed"):
        next(batches)


def test_held_batches_keep_their_pixels_and_labels(files):
    loader = load(files, "square", spec_of(), shard=Shard(0, 1, 5))
    loader.set_epoch(0, 0)
    held, copies = [], []
    for images, labels in loader:
        held.append((images, labels))
        copies.append((images.clone(), labels.clone()))
    assert len(held) == 40
    assert same(held, copies)
    for images, labels in held:
        images.zero_()
        labels.zero_()
    assert same(read(loader), copies)


def test_an_error_in_the_pipeline_reaches_the_reader(files, monkeypatch):
    loader = load(files, "square", spec_of())
    original, calls = ffcv_loader.augment.crop_offsets, []

    def break_down(*arguments):
        calls.append(arguments)
        if len(calls) == 4:
            raise ArithmeticError("no offsets today")
        return original(*arguments)

    monkeypatch.setattr(ffcv_loader.augment, "crop_offsets", break_down)
    before, started, got = own_threads(), time.monotonic(), []
    with pytest.raises(ArithmeticError, match="no offsets today"):
        got.extend(loader)
    assert len(got) == 3
    assert time.monotonic() - started < 30
    assert own_threads() == before
    monkeypatch.undo()
    assert len(read(loader)) == len(loader)


def test_a_thread_that_dies_in_silence_is_an_error(files, monkeypatch):
    monkeypatch.setattr(ffcv_epoch.EpochReader, "_run", lambda self: None)
    monkeypatch.setattr(ffcv_epoch, "POLL_SECONDS", 0.05)
    with pytest.raises(RuntimeError, match="ended without a word"):
        next(iter(load(files, "square", spec_of())))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_page_readers_that_die_are_an_error(files, tmp_path, monkeypatch):
    monkeypatch.setattr(ffcv_epoch, "POLL_SECONDS", 0.05)
    path = tmp_path / "gone.beton"
    path.write_bytes(files["square"][0].read_bytes())
    loader = load({"gone": (path, files["square"][1])}, "gone", spec_of(os_cache=False))
    path.unlink()
    before = own_threads()
    with pytest.raises(RuntimeError, match="page reader died"):
        next(iter(loader))
    assert own_threads() == before


def test_a_damaged_image_is_named(files, tmp_path):
    path, source = files["jpeg"]
    spoilt = tmp_path / "spoilt.beton"
    blob = bytearray(path.read_bytes())
    at = blob.index(b"\xff\xd8", blob.index(b"\xff\xd8", blob.index(b"\xff\xd8") + 1) + 1)  # the third image
    blob[at : at + 300] = bytes(300)
    spoilt.write_bytes(blob)
    loader = load({"spoilt": (spoilt, source)}, "spoilt", spec_of(), training=False, eval_batch=2)
    batches = iter(loader)
    next(batches)
    with pytest.raises(UserError, match=r"spoilt\.beton: image 2 is damaged"):
        next(batches)


def test_files_that_are_damaged_or_hold_too_little_are_refused(files, tmp_path):
    path, source = files["square"]
    short = tmp_path / "short.beton"
    short.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"short\.beton: truncated"):
        load({"short": (short, source)}, "short", spec_of())
    with pytest.raises(UserError, match="holds 203 samples"):
        load(files, "square", spec_of(), np.arange(SAMPLES + 1))


def test_workers_are_capped_and_torch_keeps_its_threads(files):
    assert load(files, "square", spec_of(), workers=1000).workers <= allowed_cpus()
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        loader = load(files, "square", spec_of(), workers=2)
        batches = iter(loader)
        next(batches)
        assert torch.get_num_threads() == 3
        loader.close()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_import_keeps_torch_threads_and_the_process_ends_quietly(files):
    done = run(f"""
        import torch
        torch.set_num_threads(3)
        import numpy as np
        from pathlib import Path
        from utils.data import beton_format, ffcv_loader
        assert torch.get_num_threads() == 3
        from utils import params
        from utils.data.order import Shard
        from utils.data.spec import DataSpec
        spec = DataSpec("folder", Path("/"), Path("/"), 7, 16, 16, 400, "raw", "crop", True, (0., 0., 0.),
                        (1., 1., 1.), 1.0, params.Data())
        loader = ffcv_loader.FFCVLoader(spec, Path({str(files["square"][0])!r}), np.arange(203), Shard(0, 1, 20),
            torch.device("cpu"), training=True, order_seed=0, channels_last=True, workers=1, eval_batch=20)
        print(sum(len(labels) for _, labels in loader))
        held = iter(loader)
        next(held)  # and the process ends with the thread at work
    """)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "200\n"
    assert done.stderr == ""
