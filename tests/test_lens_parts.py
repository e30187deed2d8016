"""Partial results of the lens, its intervals, and mistakes in what is asked of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from fixtures import zoo
from streamlens.analyses.lens.door import lens_result, logit_lens
from streamlens.analyses.lens.head import head_of
from streamlens.analyses.lens.tally import LensOptions, LensTally
from streamlens.analyses.source import Source, source_of
from streamlens.analyses.statistics import DocumentSums, bootstrap
from streamlens.errors import UsageError
from tests.conftest import case
from tests.test_lens import KS, look


def tallies(source: Source, options: LensOptions) -> Iterator[LensTally]:
    blocks = list(source.blocks())
    for part in (blocks, blocks[: len(blocks) // 2], blocks[len(blocks) // 2 :]):
        tally = LensTally(source, head_of(source, blocks[0]), options)
        with torch.no_grad():
            for block in part:
                tally.update(block)
        yield tally


@pytest.mark.parametrize("docs", [6, 1])
@pytest.mark.parametrize("turned", [False, True])
def test_halves_merge_into_the_whole(turned: bool, docs: int) -> None:
    module = zoo.build("gpt2").module
    source = source_of(module, tokens=torch.arange(72).reshape(docs, -1) % 97, window=12, batch_tokens=12)
    options = LensOptions(tuple(range(7)), KS, None, True, None, None, (0, 3))
    whole, first, second = tallies(source, options)
    first, second = (second, first) if turned else (first, second)
    first.merge(second)
    expected, found = (lens_result(source, tally) for tally in (whole, first))
    for name, summary in expected.metrics.items():
        for field in ("mean", "low", "high", "all_positions"):
            np.testing.assert_allclose(getattr(found.metrics[name], field), getattr(summary, field), rtol=1e-12)
    assert found.kl.median is not None
    np.testing.assert_array_equal(found.kl.median, expected.kl.median)
    assert found.depth.tolist() == expected.depth.tolist()
    assert found.depth_all_positions.tolist() == expected.depth_all_positions.tolist()
    assert (found.tokens, found.documents) == (72, docs)
    assert found.grid is not None
    assert expected.grid is not None
    assert found.grid.doc == expected.grid.doc == 0
    assert (found.grid.top == expected.grid.top).all()


@pytest.mark.parametrize(("docs", "unit"), [(1, "window"), (9, "window"), (12, "document")])
def test_few_documents_give_intervals_over_windows(docs: int, unit: str) -> None:
    tokens = torch.randint(0, 97, (docs, 24 if docs > 1 else 144), generator=torch.Generator().manual_seed(0))
    found = logit_lens(case("gpt2").module, tokens=tokens, window=12, progress=False)
    assert found.interval_over == unit
    assert {row["interval_over"] for row in found.rows()} == {unit}
    assert (found.kl.low[:-1] < found.kl.mean[:-1]).all()
    assert (found.kl.mean[:-1] < found.kl.high[:-1]).all()


def test_intervals_are_those_of_a_bootstrap_over_documents() -> None:
    sums = DocumentSums(2)
    generator = torch.Generator().manual_seed(1)
    values, doc = torch.randn(2, 60, generator=generator), torch.arange(60) // 7
    values[1, ::5] = torch.nan
    for rows in (slice(0, 30), slice(30, 60)):
        sums.add(values[:, rows], doc[rows])
    low, high = sums.intervals()
    for series in range(2):
        own = [values[series][(doc == d) & ~values[series].isnan()].double() for d in range(9)]
        alone = bootstrap([float(v.sum()) for v in own], [len(v) for v in own])
        assert (sums.mean[series], low[series], high[series]) == pytest.approx((alone.mean, alone.low, alone.high))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"states": [9]}, "states 0 to 6, not 9"),
        ({"top_k": [0]}, "1 or more, not 0"),
        ({"top_k": [5, -1]}, "1 or more, not -1"),
        ({"dtype": "int8"}, "choose float32, bfloat16"),
        ({"dtype": "nonsense"}, "choose float32, bfloat16"),
        ({"translators": "missing.pt"}, "missing.pt is not there"),
    ],
)
def test_mistakes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        look(case("gpt2"), **options)


def test_legends_of_the_panels_lie_on_nothing_and_ranks_say_what_is_drawn() -> None:
    figure = look(case("gpt2")).plot().get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    for ax in figure.axes:
        legend = ax.get_legend()
        assert legend is not None
        box, own = legend.get_window_extent(), ax.get_window_extent()
        assert box.y0 >= own.y1 - 1, "above its axes"
        assert box.x1 <= own.x1 + 0.02 * figure.bbox.width, "and no wider"
        assert ax.get_ylabel()[0].isupper()
    assert figure.axes[1].get_ylabel() == "Rank + 1, log scale\n(median, quartiles)"
    assert min(figure.axes[1].get_lines()[1].get_ydata()) == 1  # type: ignore[arg-type, type-var]


def test_the_grid_says_what_is_framed_in_letters_that_can_be_read() -> None:
    found = look(case("gpt2"), grid_positions=range(6)).grid
    assert found is not None
    ax = found.plot()
    assert ax.get_title(loc="left").replace("\n", " ").endswith("Framed: the likeliest token is the target")
    assert len(ax.patches) == sum(row["hit"] for row in found.rows())
    assert {text.get_fontsize() for text in ax.texts} == {8.0}
