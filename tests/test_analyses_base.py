"""What all analyses stand on: statistics that stream and merge, results that save and show themselves, figures."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg

from streamlens.analyses.figures import axes, finish, interval, panels, style
from streamlens.analyses.result import Result
from streamlens.analyses.statistics import Moments, Quantiles
from streamlens.errors import UsageError

# ---- statistics ---------------------------------------------------------------------------------------------------


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    """Numbers of many sizes and both signs, with zeros and NaN among them."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator) * 10 ** (3 * torch.randn(shape, generator=generator))
    place = torch.rand(shape, generator=generator)
    values[place < 0.1] = 0.0
    values[place > 0.93] = float("nan")
    return values


def test_moments_are_those_of_numpy() -> None:
    values = drawn(3, 500)
    moments = Moments(3)
    moments.add(values[:, :123])
    moments.add(values[:, 123:])
    wide = values.double().numpy()
    np.testing.assert_array_equal(moments.count, (~np.isnan(wide)).sum(-1))
    np.testing.assert_allclose(moments.mean, np.nanmean(wide, -1), rtol=1e-12)
    np.testing.assert_allclose(moments.std, np.nanstd(wide, -1), rtol=1e-9)


def test_moments_of_some_series_only_and_merged() -> None:
    values = drawn(2, 2, 50)
    whole, first, second = Moments(2, 2), Moments(2, 2), Moments(2, 2)
    whole.add(values)
    for row in range(2):
        for column in range(2):
            first.add(values[row, column, :20], at=(row, column))
        second.add(values[row, :, 20:], at=row)
    first.merge(second)
    np.testing.assert_array_equal(first.count, whole.count)
    np.testing.assert_allclose(first.mean, whole.mean, rtol=1e-12)
    np.testing.assert_allclose(first.std, whole.std, rtol=1e-9)


def test_moments_of_nothing_and_of_no_spread() -> None:
    moments = Moments(2)
    moments.add(torch.tensor([[float("nan")] * 3, [0.1] * 3]))
    assert np.isnan(moments.mean[0])
    assert np.isnan(moments.std[0])
    assert moments.std[1] == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_quantiles_keep_their_bound(share: float, seed: int) -> None:
    values = drawn(2, 801, seed=seed).clamp(-1e7, 1e7)
    sketch = Quantiles(2)
    sketch.add(values)
    for row, found in zip(values.double().numpy(), sketch.at(share), strict=True):
        known = np.sort(row[~np.isnan(row)])
        place = share * (len(known) - 1)
        low, high = known[int(np.floor(place))], known[int(np.ceil(place))]
        near = [end for end in (low, high) if abs(found - end) <= 0.0051 * abs(end) + 1e-8]
        assert near, (found, low, high)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=40), st.floats(0, 1))
def test_quantiles_lie_next_to_an_order_statistic(numbers: list[float], share: float) -> None:
    sketch = Quantiles(1)
    sketch.add(torch.tensor([numbers], dtype=torch.float64))
    found = sketch.at(share)[0]
    known = np.sort(numbers)
    place = share * (len(known) - 1)
    ends = known[int(np.floor(place))], known[int(np.ceil(place))]
    assert any(abs(found - end) <= 0.0051 * abs(end) + 1e-8 for end in ends)


def test_merged_quantiles_are_those_of_the_whole() -> None:
    values = drawn(3, 400)
    whole, first, second = Quantiles(3), Quantiles(3), Quantiles(3)
    whole.add(values)
    first.add(values[:, :150])
    for row in range(3):
        second.add(values[row, 150:], at=row)
    first.merge(second)
    for share in (0.1, 0.5, 0.9):
        np.testing.assert_array_equal(first.at(share), whole.at(share))


def test_quantiles_of_nothing_of_zeros_and_beyond_the_range() -> None:
    sketch = Quantiles(3)
    sketch.add(torch.tensor([[float("nan")] * 3, [0.0] * 3, [1e12, float("inf"), 1e30]]))
    nothing, zeros, huge = sketch.at(0.5)
    assert np.isnan(nothing)
    assert zeros == 0
    assert huge == pytest.approx(1e8, rel=0.006)
    infinite = Quantiles(1)
    infinite.add(torch.tensor([[1.0, 2.0, float("inf")]]))
    assert infinite.at(1.0)[0] == pytest.approx(1e8, rel=0.006)


# ---- results ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes(Result):
    """A result with a few rows."""

    title: str
    values: tuple[float, ...]

    def rows(self) -> list[dict[str, Any]]:
        """One row for each value."""
        return [{"layer": i, "size": v, "count": np.int64(i)} for i, v in enumerate(self.values)]

    def plot(self, ax: Axes | None = None) -> Axes:
        """A line and its interval."""
        ax = axes(ax)
        places = list(range(len(self.values)))
        ax.plot(places, self.values, label="size")
        interval(ax, places, [v - 1 for v in self.values], [v + 1 for v in self.values], "black")
        return finish(ax, x="layer", y="size (nats)", title=self.title)


RESULT = Sizes("Sizes of <a model>", tuple(float(i * i) for i in range(10)))


@pytest.mark.parametrize(
    ("suffix", "start"), [(".png", b"\x89PNG"), (".pdf", b"%PDF"), (".svg", b"<?xml"), (".csv", b"layer,size,count")]
)
def test_saved_as_the_suffix_says(suffix: str, start: bytes, tmp_path: Path) -> None:
    path = RESULT.save(tmp_path / f"sizes{suffix}")
    assert path.read_bytes().startswith(start)


def test_saved_tables_come_back(tmp_path: Path) -> None:
    pd.testing.assert_frame_equal(pd.read_csv(RESULT.save(tmp_path / "s.csv")), RESULT.to_frame())
    pd.testing.assert_frame_equal(pd.read_parquet(RESULT.save(str(tmp_path / "s.parquet"))), RESULT.to_frame())
    rows = json.loads(RESULT.save(tmp_path / "s.json").read_text())
    assert rows == [{"layer": i, "size": float(i * i), "count": i} for i in range(10)]


@pytest.mark.parametrize("name", ["sizes.xlsx", "sizes", "sizes.PNG.gz"])
def test_a_suffix_that_is_not_known(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\.png, \.svg, \.pdf, \.csv, \.parquet, \.json"):
        RESULT.save(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_shown_in_a_notebook() -> None:
    shown = RESULT._repr_html_()
    assert "<svg" in shown
    assert shown.index("<figure") < shown.index("<svg") < shown.index("</figure>")
    assert "<?xml" not in shown
    assert "Sizes of &lt;a model&gt;" in shown
    assert "<a model>" not in shown[shown.index("<details") :]
    assert shown.count("<tr") == 8 + 1
    assert "10 rows" in shown
    assert "rows: <code>" not in Sizes("few", (1.0,))._repr_html_()


@dataclass(frozen=True)
class Wide(Sizes):
    """A result that knows which columns matter, and has one without any value."""

    def rows(self) -> list[dict[str, Any]]:
        """With a column that holds nothing."""
        return [{**row, "nothing": float("nan"), "none": None, "rarely": 1.0} for row in super().rows()]

    def short_rows(self) -> list[dict[str, Any]]:
        """Without the last column."""
        return [{k: v for k, v in row.items() if k != "rarely"} for row in self.rows()]


def test_a_wide_table_is_shown_by_its_short_columns_and_scrolls() -> None:
    shown = Wide("wide", (1.0, 2.0))._repr_html_()
    table = shown[shown.index("overflow-x:auto") : shown.index("</table>")]
    assert re.findall(r"<th>(.*?)</th>", table) == ["layer", "size", "count"]


def test_as_text_a_result_is_one_line_without_its_arrays() -> None:
    assert repr(RESULT) == "<Sizes: Sizes of <a model>>"
    assert repr(Wide("wide", (1.0, 2.0))) == "<Wide: wide>"
    assert repr(Sizes("", (1.0,))) == "<Sizes>"


# ---- figures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".svg", ".pdf", ".png"])
def test_the_same_numbers_give_the_same_bytes(suffix: str, tmp_path: Path) -> None:
    first = RESULT.save(tmp_path / f"a{suffix}").read_bytes()
    assert RESULT.save(tmp_path / f"b{suffix}").read_bytes() == first


def test_the_users_settings_stay_as_they_were(tmp_path: Path) -> None:
    with mpl.rc_context({"font.size": 17.0, "axes.spines.top": True, "legend.frameon": True}):
        before = dict(mpl.rcParams)
        RESULT.save(tmp_path / "a.png")
        RESULT._repr_html_()
        panels(2, 1)
        with pytest.raises(ZeroDivisionError), style():
            raise ZeroDivisionError
        assert dict(mpl.rcParams) == before


def test_no_figure_stays_open_behind_the_users_back() -> None:
    from matplotlib import pyplot

    before = pyplot.get_fignums()
    RESULT.plot()
    RESULT._repr_html_()
    assert pyplot.get_fignums() == before


def test_drawn_into_the_axes_that_are_given() -> None:
    left, right = panels(1, 2)
    assert RESULT.plot(right) is right
    assert right.lines
    assert not left.lines
    assert right.get_xlabel() == "layer"
    assert right.get_ylabel() == "size (nats)"


def test_a_long_title_is_broken_not_cut() -> None:
    ax = Sizes("a very long title " * 12, (1.0, 2.0)).plot()
    figure: Any = ax.get_figure()
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    assert "\n" in ax.get_title(loc="left")
    box = ax.get_tightbbox(canvas.get_renderer())
    assert box is not None
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1 + 1


@pytest.mark.parametrize("decades", [1, 2, 4, 9])
def test_labels_of_a_log_axis_do_not_overlap(decades: int) -> None:
    ax = axes(None, width=3.0, height=2.4)
    ax.plot([0, 1], [1.0, 10.0**decades])
    ax.set_yscale("log")
    finish(ax, x="x", y="y")
    FigureCanvasAgg(ax.get_figure(root=True)).draw()  # type: ignore[no-untyped-call]
    low, high = ax.get_ylim()
    shown = [t for t in ax.yaxis.get_major_ticks() if low <= t.get_loc() <= high]
    boxes = [t.label1.get_window_extent() for t in sorted(shown, key=lambda t: t.get_loc())]
    assert len(boxes) >= 3
    assert all(below.y1 <= above.y0 for below, above in pairwise(boxes))
