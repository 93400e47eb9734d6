"""The plot: an image of the type asked for, with the curves, ticks and reference lines it promises."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from utils.reporting.plot import plot_levels
from utils.system.errors import UserError


def make_run(path: Path, densities: list[float], seed: int = 0, name: str = "lrr", **row: Any) -> Path:
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(f"run:\n  name: {name}\n  seed: {seed}\n")
    for level, density in enumerate(densities):
        content = {
            "run": path.name, "seed": seed, "level": level, "target_density": density, "density": density,
            "sparsity": 1 - density, "kept_weights": 8, "prunable_weights": 10, "epochs": 2, "mask_digest": "ab",
            "final_test_acc": 90.0 - level + seed, **row,
        }  # fmt: skip
        folder = path / f"level_{level:02d}"
        folder.mkdir()
        (folder / "row.json").write_text(json.dumps(content))
    return path


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Axes]:
    """The axes of every figure saved during the test."""
    axes: list[Axes] = []
    save = Figure.savefig

    def spy(figure: Figure, *args: Any, **kwargs: Any) -> None:
        axes.extend(figure.axes)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", spy)
    return axes


def test_a_curve_with_its_dense_line_and_percent_ticks(tmp_path: Path, drawn: list[Axes]) -> None:
    out = plot_levels([make_run(tmp_path / "a", [1.0, 0.5, 0.2, 0.025])], tmp_path / "out" / "x.png")
    assert out.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    (axes,) = drawn
    curve, dense = axes.get_lines()
    assert list(curve.get_xdata()) == [1.0, 0.5, 0.2, 0.025]
    assert list(curve.get_ydata()) == [90.0, 89.0, 88.0, 87.0]
    assert set(dense.get_ydata()) == {90.0}
    assert axes.get_xscale() == "log"
    assert axes.xaxis_inverted()
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["100%", "50%", "20%", "2.5%"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["lrr"]


def test_seeds_are_one_curve_with_a_band(tmp_path: Path, drawn: list[Axes]) -> None:
    for seed in (0, 2, 4):
        make_run(tmp_path / f"a{seed}", [0.5, 0.2], seed=seed)
    plot_levels([tmp_path / "*"], tmp_path / "x.svg")
    (axes,) = drawn
    (curve,) = axes.get_lines()
    assert list(curve.get_ydata()) == [92.0, 91.0]
    (band,) = axes.collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == pytest.approx((89.0, 94.0))
    assert axes.get_legend().get_texts()[0].get_text() == "lrr, 3 seeds"


def test_experiments_are_curves_of_their_own(tmp_path: Path, drawn: list[Axes]) -> None:
    make_run(tmp_path / "a", [0.5], name="lrr")
    make_run(tmp_path / "b", [0.5], name="imp")
    plot_levels([tmp_path / "a", tmp_path / "b"], tmp_path / "x.png")
    assert [text.get_text() for text in drawn[0].get_legend().get_texts()] == ["lrr", "imp"]
    assert len({line.get_color() for line in drawn[0].get_lines()}) == 2


def test_many_levels_get_ticks_at_halves(tmp_path: Path, drawn: list[Axes]) -> None:
    plot_levels([make_run(tmp_path / "a", [0.8**k for k in range(21)])], tmp_path / "x.png")
    labels = [tick.get_text() for tick in drawn[0].get_xticklabels()]
    assert labels == ["100%", "50%", "25%", "12.5%", "6.25%", "3.12%", "1.56%"]


def test_density_zero_is_named_and_not_drawn(tmp_path: Path, drawn: list[Axes]) -> None:
    plot_levels([make_run(tmp_path / "a", [1.0, 0.0])], tmp_path / "x.png")
    assert list(drawn[0].get_lines()[0].get_xdata()) == [1.0]
    assert "1 level at density 0 not shown" in drawn[0].get_xlabel()


@pytest.mark.parametrize(
    ("out", "metric", "word"),
    [("x.txt", "final_test_acc", ".txt"), ("x.png", "accuracy", "accuracy"), ("x.png", "run", "run"),
     ("x.png", "val_acc", "val_acc")],
)  # fmt: skip
def test_what_cannot_be_drawn_is_refused_and_leaves_no_file(tmp_path: Path, out: str, metric: str, word: str) -> None:
    run = make_run(tmp_path / "a", [1.0, 0.5])
    with pytest.raises(UserError, match=word):
        plot_levels([run], tmp_path / out, metric)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]
