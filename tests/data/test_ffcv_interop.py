"""This loader and FFCV's own code: files pass both ways, and numba's types are left alone."""

from __future__ import annotations

import numba
import numpy as np
import pytest

pytestmark = [pytest.mark.ffcv, pytest.mark.xdist_group("ffcv")]

pytest.importorskip("ffcv", reason="FFCV is not installed")

from tests.data import ffcv_cases  # noqa: E402
from tests.data.ffcv_cases import load, read, run, same, spec_of  # noqa: E402
from utils.data import beton  # noqa: E402
from utils.data.spec import DataSpec  # noqa: E402


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return ffcv_cases.write_files(tmp_path_factory.mktemp("betons"))


def test_files_pass_between_this_writer_and_ffcvs_own(files, tmp_path, capfd):
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    source = files["mixed"][1]
    pairs = [(image, int(label)) for image, label in zip(source.images, source.labels, strict=True)]
    for mode in ("raw", "jpg"):
        own = tmp_path / f"own-{mode}.beton"
        fields = {"image": RGBImageField(write_mode=mode, max_resolution=50, jpeg_quality=90), "label": IntField()}
        DatasetWriter(str(own), fields, num_workers=1).from_indexed_dataset(pairs)
        capfd.readouterr()
        turned = tmp_path / f"turned-{mode}.beton"
        fields = dict(reversed(fields.items()))
        DatasetWriter(str(turned), fields, num_workers=1).from_indexed_dataset([pair[::-1] for pair in pairs])
        capfd.readouterr()
        spec = spec_of(mode, plain=True)
        assert beton.check(own, spec, "train")["samples"] == 60
        assert beton.labels(own).tolist() == source.labels.tolist()
        ours = tmp_path / f"ours-{mode}.beton"
        beton.write(source, ours, DataSpec(**{**vars(spec), "max_resolution": 50}), 1)
        assert beton.labels(turned).tolist() == source.labels.tolist()
        first, *others = [read(load({"x": (f, source)}, "x", spec, training=False)) for f in (ours, own, turned)]
        assert all(same(first, other) for other in others)


def test_ffcvs_own_loader_reads_what_is_written(files, tmp_path):
    """In a process of its own: FFCV's loader changes numba's types in place."""
    path, source = files["square"]
    done = run(f"""
        import numpy as np, torch
        from ffcv.loader import Loader, OrderOption
        loader = Loader({str(path)!r}, 10, num_workers=1, order=OrderOption.SEQUENTIAL, drop_last=False)
        images, labels = (torch.cat(parts) for parts in zip(*((a.clone(), b.clone()) for a, b in loader)))
        np.savez({str(tmp_path / "read.npz")!r}, images=images.numpy(), labels=labels.numpy())
    """)
    assert done.returncode == 0, done.stderr
    got = np.load(tmp_path / "read.npz")
    assert np.array_equal(got["images"], np.stack(source.images))
    assert got["labels"].reshape(-1).tolist() == source.labels.tolist()


def test_numbas_types_stay_as_they_are(files):
    """FFCV's loader marks numba's one type of byte arrays read-only, after which compiled code is not found again."""
    arrays = [numba.types.uint8[::1], numba.types.uint64[::1], numba.types.uint8[:, ::1], numba.types.uint32[::1]]
    for os_cache in (True, False):
        read(load(files, "square", spec_of(os_cache=os_cache)))
    assert all(array.mutable for array in arrays)
