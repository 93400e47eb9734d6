"""Networks of torchvision and timm shrink exactly, or are refused by name with a reason: some, and by mark all."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch

from utils.pruning.structured import __main__ as command
from utils.pruning.structured.sweep import FAMILIES, TOLERANCE, examine
from utils.system.errors import UserError

SHORT = ("cifar/resnet20", "torchvision/squeezenet1_1", "timm/mobilenetv3_large_100", "timm/vit_tiny_patch16_224")


@pytest.mark.parametrize("name", SHORT)
def test_a_network_shrinks_exactly(name: str) -> None:
    found = examine(name)
    assert found.output <= TOLERANCE
    assert found.gradient <= TOLERANCE
    assert found.macs < 0.7


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [name for name in FAMILIES if "swin" not in name and "maxvit" not in name])
def test_every_family_shrinks_exactly_or_is_refused(name: str) -> None:
    """Graphs of Swin and MaxViT take minutes to build; the command stops them by its time limit."""
    try:
        found = examine(name)
    except UserError as error:
        assert str(error).startswith(f"structured pruning of {name}: ")  # noqa: PT017
    else:
        assert found.macs < 1.0


def test_a_wrong_shrink_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of one layer in another order: shapes agree, outputs do not."""
    shrink_module = importlib.import_module("utils.pruning.structured.shrink")
    right = shrink_module.selected

    def wrong(tensor: torch.Tensor, dims: dict[int, torch.Tensor]) -> torch.Tensor:
        changed = copy.copy(dims)
        if tensor.dim() == 4 and 1 in changed:
            changed[1] = changed[1].flip(0)
        return right(tensor, changed)

    monkeypatch.setattr(shrink_module, "selected", wrong)
    with pytest.raises(UserError, match=r"its output differs|its groups do not shrink"):
        examine("cifar/resnet20")


def test_the_command_writes_a_table(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "t.md"
    code = command.main(["table", "cifar/resnet20", "torchvision/shufflenet_v2_x1_0", "--out", str(out)])
    text = out.read_text()
    assert code == 0
    assert "| `cifar/resnet20` | yes | 13 (1) |" in text
    assert "| `torchvision/shufflenet_v2_x1_0` | no: its channels cannot be followed" in text
    assert text.endswith("1 of 2 shrink.\n")
