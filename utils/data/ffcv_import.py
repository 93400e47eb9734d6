"""FFCV, imported with its side effects undone: everything of it that Sieve uses comes from here.

Importing FFCV sets torch to one thread, and so does building a pipeline; `kept_torch_threads` puts the count back.
On Python 3.12 and later FFCV needs the `distutils` that setuptools brings. Raises UserError when FFCV is not installed.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import torch

from utils.system.errors import UserError


@contextlib.contextmanager
def kept_torch_threads() -> Iterator[None]:
    """Leave torch's thread count as it was before the body."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


with kept_torch_threads():
    if sys.version_info >= (3, 12):
        with contextlib.suppress(ImportError):
            import setuptools  # noqa: F401
    try:
        from ffcv.fields.basics import IntDecoder
        from ffcv.fields.rgb_image import SimpleRGBImageDecoder
        from ffcv.libffcv import ctypes_imdecode, ctypes_resize
        from ffcv.loader import Loader, OrderOption
        from ffcv.pipeline import Compiler
        from ffcv.pipeline.allocation_query import AllocationQuery
        from ffcv.pipeline.state import State
        from ffcv.transforms import ToDevice, ToTensor
    except (ImportError, OSError) as error:
        raise UserError(
            f"data.loader=ffcv: FFCV cannot be imported ({' '.join(str(error).split())}); "
            "run make setup, or set data.loader=torchvision"
        ) from error

__all__ = [
    "AllocationQuery",
    "Compiler",
    "IntDecoder",
    "Loader",
    "OrderOption",
    "SimpleRGBImageDecoder",
    "State",
    "ToDevice",
    "ToTensor",
    "ctypes_imdecode",
    "ctypes_resize",
    "kept_torch_threads",
]
