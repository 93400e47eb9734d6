"""Operations that can be differentiated twice, in the place of fast ones that cannot."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode


@contextlib.contextmanager
def math_attention() -> Iterator[None]:
    """Within it what has no double backward is computed by operations that have one.

    Attention: plain matrix products instead of fused kernels. Hard sigmoid: relu6(x + 3) / 6.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), _PlainHardSigmoid():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


class _PlainHardSigmoid(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.hardsigmoid:
            return _hard_sigmoid(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _hard_sigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    value = functional.relu6(input + 3.0) / 6.0
    return input.copy_(value) if inplace else value
