"""In which number format the forward pass runs. Weights, gradients and optimizer state are float32 throughout."""

from __future__ import annotations

from pathlib import Path

import torch

from utils.system.errors import UserError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose(precision: str, device: torch.device) -> torch.dtype:
    """`auto`, `float32`, `bfloat16` or `float16` to the dtype of the forward pass.

    auto: bfloat16 on GPUs that compute in it and on CPUs with AMX or AVX512-bf16, else float32. A CPU takes either half
    format when asked to, slowly where it must emulate it. Raises UserError for what the device cannot do.
    """
    if precision == "auto":
        return torch.bfloat16 if has_bfloat16(device) else torch.float32
    if precision not in _DTYPES:
        raise UserError(f"training.precision={precision}: choose one of auto, {', '.join(_DTYPES)}")
    if precision == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        name = torch.cuda.get_device_name(device)
        raise UserError(
            f"training.precision=bfloat16: {name} has no bfloat16; set training.precision=float16 or float32"
        )
    return _DTYPES[precision]


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Context in which the forward pass runs in `dtype`; float32 switches autocast off, an outer one included."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def scaler(device: torch.device, dtype: torch.dtype) -> torch.amp.GradScaler:
    """Loss scaling for float16, whose small gradients vanish; for any other dtype it passes everything through."""
    return torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16 rather than emulating it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    probes = [getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")]
    if all(callable(probe) for probe in probes):
        return any(bool(probe()) for probe in probes if probe is not None)
    return bool(cpu_flags() & {"amx_bf16", "avx512_bf16"})


def cpu_flags(path: str | Path = "/proc/cpuinfo") -> set[str]:
    """Instruction sets the kernel lists for the first CPU; empty where it does not say."""
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return set()
    return next((set(line.partition(":")[2].split()) for line in text.splitlines() if line.startswith("flags")), set())
