"""`Step` reads and writes points in training."""

from __future__ import annotations

import pytest

from utils.params import Step


@pytest.mark.parametrize(
    ("text", "step", "at_100"),
    [("500it", Step(0, 500), 500), ("3ep", Step(3), 300), ("3ep50it", Step(3, 50), 350), ("0it", Step(), 0)],
)
def test_forms(text: str, step: Step, at_100: int) -> None:
    assert Step.parse(text) == step
    assert step.at(100) == at_100
    assert str(step) == text


@pytest.mark.parametrize(
    "text", ["", " ", "5", "ep", "it", "5 ep", "1.5ep", "50it3ep", "3ep3ep", "-3it", "3EP", "3ep\n4it"]
)
def test_other_forms_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="3ep50it"):
        Step.parse(text)
