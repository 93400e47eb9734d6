"""Precision: what `auto` becomes on which hardware, and that each format trains."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from utils.system.errors import UserError
from utils.training import precision

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(("amx", "avx"), [(False, False), (True, False), (False, True), (True, True)])
def test_auto_on_a_cpu_asks_its_instruction_sets(monkeypatch: pytest.MonkeyPatch, amx: bool, avx: bool) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx, raising=False)
    assert precision.choose("auto", CPU) == (torch.bfloat16 if amx or avx else torch.float32)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("fpu sse2 avx512f", torch.float32), ("fpu avx512_bf16", torch.bfloat16), ("amx_bf16 amx_tile", torch.bfloat16)],
)
def test_auto_reads_the_kernels_list_when_torch_cannot_say(
    monkeypatch: pytest.MonkeyPatch, flags: str, expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported", raising=False)
    monkeypatch.setattr(precision, "cpu_flags", lambda: set(flags.split()))
    assert precision.choose("auto", CPU) == expected


def test_auto_is_float32_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert precision.choose("auto", CPU) == torch.float32


def test_cpu_flags(tmp_path: Path) -> None:
    listing = tmp_path / "cpuinfo"
    listing.write_text("processor\t: 0\nflags\t\t: fpu amx_tile avx512_bf16\n\nprocessor\t: 1\nflags\t: other\n")
    assert precision.cpu_flags(listing) == {"fpu", "amx_tile", "avx512_bf16"}
    assert precision.cpu_flags(tmp_path / "absent") == set()


@pytest.mark.parametrize("native", [True, False])
def test_auto_on_a_gpu_wants_native_support(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    assert precision.choose("auto", GPU) == (torch.bfloat16 if native else torch.float32)


def test_a_gpu_without_bfloat16_refuses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
    with pytest.raises(UserError, match=r"training\.precision=bfloat16.*Old GPU"):
        precision.choose("bfloat16", GPU)
    assert precision.choose("float16", GPU) == torch.float16


def test_words_become_dtypes() -> None:
    assert [precision.choose(word, CPU) for word in ("float32", "bfloat16", "float16")] == [
        torch.float32,
        torch.bfloat16,
        torch.float16,
    ]
    with pytest.raises(UserError, match=r"training\.precision=fp8"):
        precision.choose("fp8", CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_format_trains_on_a_cpu(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scaler = precision.scaler(CPU, dtype)
    assert scaler.is_enabled() == (dtype == torch.float16)
    images, labels, losses = torch.randn(16, 3, 4, 4), torch.randint(3, (16,)), []
    for _ in range(40):
        with precision.autocast(CPU, dtype):
            logits = model(images)
        assert logits.dtype == dtype
        loss = nn.functional.cross_entropy(logits.float(), labels)
        losses.append(loss.item())
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert losses[-1] < 0.7 * losses[0]


def test_float32_switches_an_outer_autocast_off() -> None:
    layer, x = nn.Linear(2, 2), torch.randn(1, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        with precision.autocast(CPU, torch.float32):
            assert layer(x).dtype == torch.float32
