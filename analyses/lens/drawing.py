"""Figures of the logit lens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib.patheffects as effects
import numpy as np
from matplotlib.colors import Normalize, SymLogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from streamlens.analyses.figures import (
    DIVERGING,
    KIND_NAMES,
    PALETTE,
    SEQUENTIAL,
    axes,
    colour_bar,
    finish,
    integer_ticks,
    interval,
    spread_out,
    style,
    wrapped,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from streamlens.analyses.lens.door import LensResult
    from streamlens.analyses.lens.grid import LensGrid
    from streamlens.analyses.lens.tally import Summary
    from streamlens.analyses.lens.tuned import TunedLens
    from streamlens.analyses.lens.writes import WriteLensResult

STATE = "State (sublayers done)"
_WORD = 8.0
"""Points, of the tokens in a table."""
FIRST, SECOND, THIRD = PALETTE["attn"], PALETTE["mlp"], PALETTE["mixer"]


def plot_panels(found: LensResult) -> Axes:
    """Draw divergence, ranks, agreement, prediction depth and, where there are targets, gains; return the first."""
    targets = bool(np.isfinite(found.delta_log_probability.mean).any())
    with style():
        figure = Figure(figsize=(7.2, 7.6 if targets else 5.4), layout="constrained")
        grid = figure.add_gridspec(2 + targets, 2)
        drawn = [figure.add_subplot(grid[i // 2, i % 2]) for i in range(4)]
        plot_kl(found, drawn[0], title="")
        plot_ranks(found, drawn[1])
        plot_overlap(found, drawn[2])
        plot_depth(found, drawn[3])
        if targets:
            drawn.append(plot_delta(found, figure.add_subplot(grid[2, :]), title=""))
        for ax in (ax for ax in drawn if ax.get_legend() is not None):
            # Above, where nothing is: in small panels curves and bands leave no corner free.
            columns = 2 if ax is drawn[0] else 3
            ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.2, handlelength=1.4)
        figure.suptitle(wrapped(found.title, 7.2), x=0.01, ha="left", fontsize=9)
    return drawn[0]


def plot_kl(found: LensResult, ax: Axes | None = None, *, title: str | None = None) -> Axes:
    """Draw KL and cross-entropy by state: means with their 95 % intervals."""
    with style():
        ax = axes(ax)
        x = found.states
        _line(ax, x, found.kl, FIRST, "KL(final || lens)")
        if np.isfinite(found.cross_entropy.mean).any():
            _line(ax, x, found.cross_entropy, SECOND, "cross-entropy to the target")
        _line(ax, x, found.entropy, THIRD, "entropy")
        ax.set_ylim(bottom=0)
        spread_out(ax, list(found.kl.mean), linear=1.0)
        integer_ticks(ax)
        return finish(ax, x=STATE, y="Nats", title=found.title if title is None else title)


def plot_ranks(found: LensResult, ax: Axes | None = None) -> Axes:
    """Draw the median rank of the target and of the final favourite, with quartiles; 1 is added for the logarithm."""
    with style():
        ax = axes(ax)
        for name, colour, label in (
            ("target_rank", SECOND, "target"),
            ("top1_rank", FIRST, "final favourite"),
        ):
            summary = found.metrics[name]
            if summary.median is None or not np.isfinite(summary.median).any():
                continue
            ax.plot(found.states, summary.median + 1, color=colour, label=label)
            assert summary.lower_quartile is not None, "kept with the median"
            assert summary.upper_quartile is not None, "kept with the median"
            interval(ax, list(found.states), list(summary.lower_quartile + 1), list(summary.upper_quartile + 1), colour)
        ax.set_yscale("log")
        integer_ticks(ax)
        return finish(ax, x=STATE, y="Rank + 1, log scale\n(median, quartiles)")


def plot_overlap(found: LensResult, ax: Axes | None = None) -> Axes:
    """Draw which share of the final likeliest tokens the lens has, for each k."""
    with style():
        ax = axes(ax)
        for k, colour in zip(found.top_k, (FIRST, SECOND, THIRD, *PALETTE.values()), strict=False):
            _line(ax, found.states, found.metrics[f"overlap_{k}"], colour, f"top {k}")
        ax.set_ylim(0, 1.02)
        integer_ticks(ax)
        return finish(ax, x=STATE, y="Share of the final top k")


def plot_depth(found: LensResult, ax: Axes | None = None) -> Axes:
    """Draw how many tokens have their final favourite from which state on."""
    with style():
        ax = axes(ax)
        ax.bar(found.states, found.depth / max(1, found.depth.sum()), width=0.9, color=FIRST, linewidth=0)
        ax.axvline(found.mean_depth, color=PALETTE["block"], linewidth=0.8, linestyle="--", label="mean")
        integer_ticks(ax)
        return finish(ax, x="Prediction depth (state)", y="Share of tokens")


def plot_delta(found: LensResult, ax: Axes | None = None, *, title: str | None = None) -> Axes:
    """Draw what each step adds to the log-probability of the target, with its interval."""
    with style():
        ax = axes(ax)
        gained = found.delta_log_probability
        spread = np.stack([gained.mean - gained.low, gained.high - gained.mean]).clip(0)
        colours = [PALETTE.get(kind.split("+")[0], PALETTE["other"]) for kind in found.kinds[1:]]
        ax.bar(found.states[1:], gained.mean, yerr=spread, color=colours, width=0.8, error_kw={"elinewidth": 0.7})
        for kind in dict.fromkeys(found.kinds[1:]):
            name = " + ".join(KIND_NAMES.get(k, k) for k in kind.split("+"))
            ax.bar([found.states[1]], [0], color=PALETTE.get(kind.split("+")[0], PALETTE["other"]), label=name)
        ax.axhline(0, color=PALETTE["block"], linewidth=0.6)
        spread_out(ax, list(gained.mean), linear=1.0)
        integer_ticks(ax)
        return finish(ax, x=STATE, y="Gain in log p(target) (nats)", title=found.title if title is None else title)


def plot_tuned(found: TunedLens, ax: Axes | None = None) -> Axes:
    """Draw the divergence on held-out documents with and without translators."""
    with style():
        ax = axes(ax)
        x = np.arange(len(found.labels))
        for values, colour, label in (
            (found.kl_logit_lens, PALETTE["norm"], "logit lens"),
            (found.kl, FIRST, f"tuned lens ({found.kind})"),
        ):
            ax.plot(x, values[:, 0], color=colour, label=label)
            interval(ax, list(x), list(values[:, 1]), list(values[:, 2]), colour)
        ax.set_ylim(bottom=0)
        spread_out(ax, list(found.kl_logit_lens[:, 0]), linear=1.0)
        integer_ticks(ax)
        return finish(ax, x=STATE, y="KL(final || lens), held out (nats)", title=found.title)


def plot_table(found: LensGrid, ax: Axes | None = None) -> Axes:
    """Draw the likeliest token of each state and position on its probability; a frame marks the target."""
    states, positions = found.top.shape
    words = found.words()
    width, height = _table_size(words)
    with style():
        ax = axes(ax, width=width, height=height)
        image = ax.imshow(
            found.probability, cmap=SEQUENTIAL, vmin=0, vmax=1, aspect="auto", origin="lower", interpolation="nearest"
        )
        for i in range(states):
            for j in range(positions):
                _word(ax, j, i, words[i][j], dark=bool(found.probability[i, j] < 0.6))
                if found.targets[j] >= 0 and found.top[i, j] == found.targets[j]:
                    ax.add_patch(
                        Rectangle((j - 0.49, i - 0.46), 0.98, 0.92, fill=False, edgecolor="#D55E00", linewidth=1.4)
                    )
        _table_ticks(ax, found.read(), found.labels)
        colour_bar(ax, image, "Probability of the likeliest token")
        finish(ax, x="Token read", y="State after")
        ax.set_title(wrapped(f"{found.title}. Framed: the likeliest token is the target", width - 1.6))
        return ax


def plot_writes(found: WriteLensResult, ax: Axes | None = None) -> Axes:
    """Draw what each part adds to the target's logit; the text is the token that the part promotes most."""
    parts, positions = found.target_logit.shape
    words = found.words()
    width, height = _table_size(words)
    with style():
        ax = axes(ax, width=width, height=height)
        largest = float(np.nanmax(np.abs(found.target_logit), initial=1e-9, where=np.isfinite(found.target_logit)))
        # Some writes at position 0 are so large that beside them a linear scale would show no other.
        norm = SymLogNorm(1.0, vmin=-largest, vmax=largest) if largest > 10 else Normalize(-largest, largest)
        image = ax.imshow(
            found.target_logit, cmap=DIVERGING, norm=norm, aspect="auto", origin="lower", interpolation="nearest"
        )
        for i in range(parts):
            for j in range(positions):
                strength = abs(2 * float(norm(np.nan_to_num(found.target_logit[i, j]))) - 1)
                _word(ax, j, i, words[i][j], dark=strength > 0.6)
        _table_ticks(ax, found.read(), found.labels)
        colour_bar(ax, image, "Centred logit of the target")
        finish(ax, x="Token read", y="Part of the last state")
        ax.set_title(wrapped(found.title, width - 1.6))
        return ax


def _table_size(words: Sequence[Sequence[str]]) -> tuple[float, float]:
    """Return width and height in inches at which every word of a table fits its cell."""
    longest = max((len(word) for row in words for word in row), default=1)
    return max(4.5, 1.8 + (0.2 + 0.08 * longest) * len(words[0])), 1.4 + 0.22 * len(words)


def _table_ticks(ax: Axes, read: Sequence[str], labels: Sequence[str]) -> None:
    texts = [_drawable(text) for text in read]
    ax.set_xticks(range(len(texts)), texts, rotation=45, ha="right", rotation_mode="anchor", parse_math=False)
    every = range(0, len(labels), max(1, -(-len(labels) // 64)))
    ax.set_yticks(list(every), [labels[i].replace("_out", "") for i in every], fontsize=_WORD)
    ax.tick_params(length=0)


def _word(ax: Axes, x: int, y: int, text: str, *, dark: bool) -> None:
    drawn = ax.text(
        x, y, _drawable(text), ha="center", va="center", fontsize=_WORD, color="white" if dark else "black",
        parse_math=False, clip_on=True,
    )  # fmt: skip
    drawn.set_path_effects([effects.withStroke(linewidth=0.6, foreground="#222222" if dark else "#ffffff")])


def _drawable(text: str) -> str:
    """Put a box for each character that the font does not have."""
    from matplotlib.font_manager import findfont, get_font

    known = get_font(findfont("DejaVu Sans")).get_charmap()
    return "".join(c if ord(c) in known else "\u25a1" for c in text)


def _line(ax: Axes, x: NDArray[np.int64], summary: Summary, colour: str, label: str) -> None:
    ax.plot(x, summary.mean, color=colour, label=label)
    interval(ax, list(x), list(summary.low), list(summary.high), colour)
