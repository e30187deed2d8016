"""Both modes where skip and zero differ, whose writes stand in for whose, and what is said in a few numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

from streamlens.analyses.ablation.blocks import ablate_blocks
from streamlens.analyses.ablation.greedy import GREEDY, drop_greedily
from streamlens.analyses.ablation.pairs import ablate_pairs
from streamlens.analyses.ablation.proxies import Proxies, rank_interval
from streamlens.analyses.ablation.repair import effects
from streamlens.analyses.ablation.runs import Runs, Setting
from streamlens.analyses.ablation.spans import every, together
from streamlens.analyses.ablation.summaries import summaries
from streamlens.analyses.ablation.sweep import ablate
from streamlens.analyses.source import Source, source_of
from streamlens.errors import UsageError
from tests.conftest import case
from tests.test_ablation import live


def one(source: Source, drop: Sequence[int | str] | str, mode: Any) -> float:
    """The score of one drop in one mode, by a run of its own."""
    found = ablate(source, drop, mode, progress=False)
    assert found.drops[0].mode == mode
    return float(found.scores.mean(found.scores.headline)[0])


# ---- both modes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", ["skip", "zero"])
def test_blocks_pairs_and_greedy_report_skip_and_zero_where_they_differ(asked: Any) -> None:
    source = live(case("user_post_norm"))
    modes = [asked, "zero" if asked == "skip" else "skip"]
    blocks = ablate_blocks(source, [1, 2], asked, progress=False)
    assert [row["mode"] for row in blocks.rows()] == [mode for mode in modes for _ in range(3)]
    assert [row["mode"] for row in blocks.best()] == [mode for mode in modes for _ in range(2)]
    pairs = ablate_pairs(source, asked, progress=False)
    greedy = drop_greedily(source, 2, asked, random_orders=1, progress=False)
    assert [row["mode"] for row in pairs.rows()] == modes
    assert list(dict.fromkeys(row["mode"] for row in greedy.rows())) == modes
    for mode, block, pair, order in zip(
        modes, (blocks, blocks.other), (pairs, pairs.other), (greedy, greedy.other), strict=True
    ):
        assert block is not None
        assert pair is not None
        assert order is not None
        assert block.mode == pair.mode == order.mode == mode
        assert block.other is None or mode == asked
        alone = [one(source, str(layer), mode) for layer in (0, 1)]
        both = one(source, "0-1", mode)
        assert block.grid[0] == pytest.approx(alone, abs=2e-5)
        assert block.grid[1, 0] == pytest.approx(both, abs=2e-5)
        assert pair.interaction[0, 1] == pytest.approx(both - sum(alone), abs=5e-5)
        assert order.scores[GREEDY].mean("delta_loss") == pytest.approx([min(alone), both], abs=2e-5)
        assert f"({' and '.join(modes)})" in block.title
    for ax in (blocks.plot(), pairs.plot()):
        figure: Any = ax.get_figure()
        assert [a.get_title(loc="left") for a in figure.axes[:2]] == [f"mode {mode}" for mode in modes]


def test_one_mode_where_they_do_not_differ() -> None:
    source = live(case("gpt2"))
    for found in (
        ablate_blocks(source, [1], progress=False),
        ablate_pairs(source, progress=False),
        drop_greedily(source, 1, random_orders=0, progress=False),
    ):
        assert found.other is None
        assert {row["mode"] for row in found.rows()} == {"skip"}
    assert ablate_pairs(live(case("user_post_norm")), "mean", progress=False).other is None


# ---- whose writes stand in ------------------------------------------------------------------------------------------


def partners_of(documents: list[int], seed: int) -> list[int]:
    """Whose writes each window gets, where the windows belong to these documents."""
    ids = torch.arange(5, 5 + 4 * len(documents)).reshape(-1, 4)
    source = source_of(case("nanogpt").module, inputs=ids)
    block = next(source.blocks())
    block = replace(block, doc=torch.tensor(documents).repeat_interleave(4))
    found: list[int] = Runs(Setting.of(source, seed=seed), block, source.inputs(block))._partners.tolist()
    return found


@pytest.mark.parametrize(
    ("documents", "own"),
    [
        ([0, 0, 1, 1, 2, 2], 0),
        ([0, 0, 0, 1, 2, 2], 0),
        ([0, 1, 2, 3, 4], 0),
        ([0, 0, 0, 0, 1], 3),  # only two of five can be of another document than their partner
        ([7, 7, 7], 3),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_windows_get_the_writes_of_another_document_wherever_that_is_possible(
    documents: list[int], own: int, seed: int
) -> None:
    found = partners_of(documents, seed)
    assert sorted(found) == list(range(len(documents)))
    assert all(window != other for window, other in enumerate(found))
    assert sum(documents[window] == documents[other] for window, other in enumerate(found)) == own
    assert found == partners_of(documents, seed)


def test_partners_are_drawn_by_the_seed() -> None:
    assert len({tuple(partners_of(list(range(8)), seed)) for seed in range(6)}) > 3


def test_a_lone_window_is_told_what_would_work() -> None:
    with pytest.raises(UsageError, match="equal length, two or more to a batch") as caught:
        ablate(case("gpt2").module, mode="resample", tokens=[torch.arange(5, 16)], window=11, progress=False)
    assert "mode mean" in str(caught.value)


# ---- proxies --------------------------------------------------------------------------------------------------------


class Counted(Sequence[Tensor]):
    """Rows that count how often each is asked for."""

    def __init__(self, rows: Sequence[Tensor]) -> None:
        self.rows, self.asked = rows, Counter[int]()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        self.asked[index] += 1
        return self.rows[index]

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))


def test_proxies_of_blocks_add_each_write_once_for_each_start() -> None:
    source = live(case("gpt2"))
    layers = every(source.stream, "layers")
    units = [together(layers[i : i + n]) for n in (1, 2, 3) for i in range(3 - n + 1)]
    (block,) = source.blocks()
    writes = Counted(block.writes)
    counted, found = replace(block, writes=writes), Proxies(source.stream, units)
    found.update(counted)
    # A write of layer l is part of the blocks that begin at 0 ... l; one look more is for its shape.
    assert all(writes.asked[s.index] <= s.layer + 2 for s in source.stream.sublayers)
    for index, unit in enumerate(units):
        alone = Proxies(source.stream, [unit])
        alone.update(block)
        for name, values in found.result().items():
            assert values[index] == alone.result()[name][0], (unit, name)


def test_the_interval_of_a_rank_correlation_by_a_plain_loop() -> None:
    rng = np.random.default_rng(0)
    proxy, drawn = rng.normal(size=7), rng.normal(size=(7, 50)).round(1)  # rounded: with ties
    expected = [spearmanr(proxy, drawn[:, draw]).statistic for draw in range(50)]
    assert rank_interval(proxy, drawn) == pytest.approx(np.quantile(expected, [0.025, 0.975]))
    assert np.isnan(rank_interval(proxy[:2], drawn[:2])).all()


# ---- in a few numbers -----------------------------------------------------------------------------------------------


def test_summaries_of_each_study() -> None:
    source = live(case("gpt2"))
    sweep, blocks = ablate(source, progress=False), ablate_blocks(source, progress=False)
    assert summaries(sweep) == {"correlations": sweep.correlations()}
    assert len(sweep.correlations()) == 6
    assert summaries(ablate(source, [1], progress=False)) == {}
    assert summaries(blocks) == {"best": blocks.best()}
    assert summaries(ablate_pairs(source, progress=False)) == {}
    found = effects(source, progress=False)
    (slope,) = summaries(found)["slope"]
    x, y = found.means["direct"], found.means["total"]
    assert slope["slope_total_on_direct"] == pytest.approx(np.linalg.lstsq(x[:, None], y, rcond=None)[0][0])
    drawn = [found.scores.drawn[name] for name in ("direct", "total")]
    fits = [np.linalg.lstsq(a[:, None], b, rcond=None)[0][0] for a, b in zip(*(d.T for d in drawn), strict=True)]
    known = [fit for fit, a in zip(fits, drawn[0].T, strict=True) if a.any()]
    assert (slope["low"], slope["high"]) == pytest.approx(np.quantile(known, [0.025, 0.975]))
    answers = summaries(found)["response"]
    assert [abs(row["response"]) for row in answers] == sorted((abs(row["response"]) for row in answers), reverse=True)
    assert sum(row["response"] for row in answers) == pytest.approx(float(found.response.sum()))


def test_effects_are_drawn_with_both_intervals() -> None:
    found = effects(live(case("gpt2")), progress=False)
    ax = found.plot()
    bars = [line.get_segments() for line in ax.collections]  # type: ignore[attr-defined]
    drawn = {tuple(np.round(np.ravel(segment), 9)) for lines in bars for segment in lines}
    x, y = found.means["direct"], found.means["total"]
    for name, along in (("direct", 0), ("total", 1)):
        low, high = found.scores.intervals(name)
        for i in range(len(x)):
            ends = [(low[i], y[i]), (high[i], y[i])] if along == 0 else [(x[i], low[i]), (x[i], high[i])]
            assert tuple(np.round(np.ravel(ends), 9)) in drawn
