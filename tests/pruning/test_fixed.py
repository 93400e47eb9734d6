"""`glob=density` entries."""

from __future__ import annotations

import pytest

from utils.pruning.fixed import assign, parse
from utils.system.errors import UserError

NAMES = ["conv1.weight", "layer1.0.conv1.weight", "layer1.1.conv1.weight", "fc.weight"]


def test_the_first_matching_entry_holds() -> None:
    found = assign(["layer1.0.*=0.5", "layer1.*=0.25", " fc.weight = 1"], NAMES)
    assert found == {"layer1.0.conv1.weight": 0.5, "layer1.1.conv1.weight": 0.25, "fc.weight": 1.0}


@pytest.mark.parametrize("text", ["fc.weight", "fc.weight=", "=0.5", "fc.weight=half", "fc=1.5", "fc=-0.1", "fc=nan"])
def test_malformed_entries_are_quoted(text: str) -> None:
    with pytest.raises(UserError, match=r"pruning\.layer_densities: '.*' is not glob=density") as caught:
        parse([text])
    assert repr(text) in str(caught.value)


def test_an_entry_without_a_layer_is_refused_with_a_hint() -> None:
    with pytest.raises(UserError, match=r"'fc.weigth' matches no prunable parameter; did you mean 'fc.weight'\?"):
        assign(["fc.weigth=0.5"], NAMES)


def test_an_entry_that_is_never_used_is_refused() -> None:
    with pytest.raises(UserError, match=r"'fc.\*' is never used"):
        assign(["*=0.5", "fc.*=1"], NAMES)


def test_layers_that_other_keys_fix_are_left_to_them() -> None:
    taken = {"conv1.weight": "pruning.first_layer"}
    assert assign(["*conv1*=0.5"], NAMES, taken) == {"layer1.0.conv1.weight": 0.5, "layer1.1.conv1.weight": 0.5}
    with pytest.raises(UserError, match=r"'conv1\.\*' is never used, pruning\.first_layer=dense keeps 'conv1\.weight'"):
        assign(["conv1.*=0.5"], NAMES, taken)
