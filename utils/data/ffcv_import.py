"""FFCV, imported with its side effects undone: everything of it that Sieve uses comes from here.

Importing FFCV sets torch to one thread; `kept_torch_threads` puts the count back.
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


@contextlib.contextmanager
def plain_dictionaries() -> Iterator[None]:
    """Within it `numba.typed.Dict` is `dict`.

    FFCV fills one as it is imported, for which numba compiles three seconds long in every process; FFCV only ever reads
    two numbers from it, outside compiled code.
    """
    import numba.typed

    own = numba.typed.Dict
    numba.typed.Dict = dict
    try:
        yield
    finally:
        numba.typed.Dict = own


with kept_torch_threads():
    if sys.version_info >= (3, 12):
        with contextlib.suppress(ImportError):
            import setuptools  # noqa: F401
    try:
        with plain_dictionaries():
            from ffcv.fields.rgb_image import SimpleRGBImageDecoder
        from ffcv.fields.basics import IntDecoder
        from ffcv.libffcv import ctypes_imdecode, ctypes_resize
        from ffcv.memory_managers import OSCacheManager, ProcessCacheManager
        from ffcv.memory_managers.os_cache import OSCacheContext
        from ffcv.pipeline import Compiler, PipelineSpec
        from ffcv.pipeline.allocation_query import AllocationQuery
        from ffcv.pipeline.graph import Graph
        from ffcv.pipeline.state import State
        from ffcv.reader import Reader
        from ffcv.transforms import ToDevice, ToTensor
    except (ImportError, OSError) as error:
        raise UserError(
            f"data.loader=ffcv: FFCV cannot be imported ({' '.join(str(error).split())}); "
            "run make setup, or set data.loader=torchvision"
        ) from error

__all__ = [
    "AllocationQuery",
    "Compiler",
    "Graph",
    "IntDecoder",
    "OSCacheContext",
    "OSCacheManager",
    "PipelineSpec",
    "ProcessCacheManager",
    "Reader",
    "SimpleRGBImageDecoder",
    "State",
    "ToDevice",
    "ToTensor",
    "ctypes_imdecode",
    "ctypes_resize",
    "kept_torch_threads",
]
