"""`streamlens ablate`: leave layers out and see what the model loses."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import click

from streamlens.cli.analysis import OriginOptions, ShowOptions, analysis_options
from streamlens.cli.capture import Numbers
from streamlens.cli.options import Sectioned
from streamlens.cli.output import print_notes
from streamlens.errors import UsageError

if TYPE_CHECKING:
    from streamlens.analyses.result import Result
    from streamlens.analyses.source import Source

COLUMNS = {
    None: ("drop", "mode", "low", "high", "top1_agreement"),
    "blocks": ("start", "length", "mode", "low", "high"),
    "pairs": ("first", "second", "mode", "interaction", "low", "high"),
    "greedy": ("order", "dropped", "layer", "mode", "low", "high"),
    "swap": ("swap", "low", "high", "top1_agreement"),
    "effects": ("drop", "direct", "indirect", "norm_effect", "total", "low", "high"),
    "correlations": ("proxy", "over", "mode", "count", "spearman", "low", "high"),
    "best": None,
    "slope": ("units", "slope_total_on_direct", "low", "high"),
    "response": None,
}
"""What the terminal's tables show besides the scores (None: all); --json, --csv and --parquet have all columns."""

TAKES = {
    None: ("mode", "units", "per_position", "protect_first"),
    "blocks": ("mode", "protect_first"),
    "pairs": ("mode", "units", "protect_first"),
    "greedy": ("mode", "protect_first", "count"),
    "swap": (),
    "effects": ("units",),
}
"""The options of each study; the first one is the sweep."""

LONGEST = 8
"""Rows of the tables below the first that the terminal shows."""

SCORES = ("delta_loss", "kl", "pooled_distance")


@click.command("ablate", cls=Sectioned)
@analysis_options
@click.option(
    "--drop-layer",
    "layers",
    type=Numbers(),
    multiple=True,
    help="Drop these layers, such as 7 or 3-5,9; may be repeated. All that is named is dropped TOGETHER, in one run.",
)
@click.option(
    "--drop", "names", multiple=True, help="Drop a sublayer together with the rest: 7.attn, 7.mlp or 7_attn_out."
)
@click.option(
    "--mode",
    type=click.Choice(["skip", "zero", "mean", "resample"]),
    help="skip: the state stays as it is. zero: nothing is written. mean: the mean write. resample: the write made in "
    "another window. [default: skip]",
)
@click.option(
    "--units",
    type=click.Choice(["layers", "sublayers", "both"]),
    help="What is dropped one by one. [default: both; layers in --pairs, sublayers in --effects]",
)
@click.option("--per-position", is_flag=True, help="In --mode mean: a mean for each position.")
@click.option("--protect-first", is_flag=True, help="Leave position 0 (the attention sink) as it is.")
@click.option("--blocks", is_flag=True, help="Drop every contiguous block of layers: start by length.")
@click.option("--pairs", is_flag=True, help="Drop every two units, and say how they interact.")
@click.option("--swap", is_flag=True, help="Exchange each layer with the next one instead.")
@click.option(
    "--greedy", type=click.IntRange(min=1), metavar="K", help="Drop K layers one after the other, cheapest first."
)
@click.option("--effects", is_flag=True, help="Direct, indirect and norm effect on the target's logit.")
def command(
    origin: OriginOptions,
    show: ShowOptions,
    layers: tuple[tuple[int, ...], ...],
    names: tuple[str, ...],
    greedy: int | None,
    **options: Any,
) -> None:
    """Leave layers or sublayers out and measure what the model loses.

    With nothing named, every layer and every sublayer is dropped by itself. The model itself is not changed: it is
    edited while it runs, from the states in the capture. The loss is in nats per token, without position 0; low and
    high are a 95 % interval over documents, or over windows where there are fewer than ten documents. Where a norm
    follows the addition, skip and zero are both shown. Below the table: how well cheap proxies rank the units
    (Spearman), the cheapest blocks, or whether later sublayers repair.

    \b
    Example:
      streamlens ablate --drop-layer 7             # the newest capture here
      streamlens ablate --units layers --plot sweep.png
      streamlens ablate model.h5 --drop 3.attn --drop 4.attn --mode mean --json
      streamlens ablate model.h5 --pairs --plot pairs.pdf
    """  # noqa: D301 - click reads the \b
    named = [*(str(n) for group in layers for n in group), *names]
    asked = {name: options.pop(name) for name in ("blocks", "pairs", "swap", "effects")}
    study, given = _given({**asked, "greedy": greedy is not None}, named, options | {"count": greedy})
    result = _run(origin.open(), study, named, given, origin.model.seed)
    from streamlens.analyses.ablation.summaries import summaries

    print_notes(_notes(result))
    more = summaries(result)
    if not show.as_json:
        more = {name: _shown(name, rows[:LONGEST]) for name, rows in more.items()}
    show.show("ablate", result, _shown(study, result.rows()), more)


def _shown(study: str | None, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the columns that the terminal shows."""
    columns = COLUMNS[study]
    return rows if columns is None else [{k: v for k, v in row.items() if k in {*columns, *SCORES}} for row in rows]


def _given(asked: dict[str, bool], named: list[str], options: dict[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """Return the study and the options that it takes; refuse those that it would have to ignore."""
    studies = [name for name, wanted in asked.items() if wanted]
    if len(studies) > 1:
        raise UsageError(f"{' and '.join(f'--{name}' for name in studies)} are different studies: pass one of them")
    study = studies[0] if studies else None
    if study is not None and named:
        raise UsageError(f"--{study} goes over all layers, so it cannot be combined with --drop-layer or --drop")
    given = {name: value for name, value in options.items() if value not in (None, False)}
    for name in given:
        if name not in TAKES[study]:
            raise UsageError(f"--{study} cannot be combined with --{name.replace('_', '-')}")
    if named and "units" in given:
        raise UsageError("--units says what a sweep goes over, so it cannot be combined with --drop-layer or --drop")
    if "per_position" in given and given.get("mode") != "mean":
        raise UsageError("--per-position is a matter of the mean write: pass --mode mean with it")
    return study, given


def _notes(result: Any) -> list[str]:
    """Say what low and high are over, and what the loss was before anything was dropped."""
    from streamlens.analyses.ablation.greedy import GreedyResult

    scores = next(iter(result.scores.values())) if isinstance(result, GreedyResult) else result.scores
    few = ": there are too few documents" if scores.unit == "window" else ""
    notes = [f"low, high: a 95 % interval over {scores.over}{few}"]
    if math.isfinite(scores.base_loss):
        notes.append(f"loss of the whole model: {scores.base_loss:.4f} nats per token")
    return notes


def _run(source: Source, study: str | None, named: list[str], options: dict[str, Any], seed: int) -> Result:
    from streamlens.analyses.ablation.blocks import ablate_blocks
    from streamlens.analyses.ablation.greedy import drop_greedily
    from streamlens.analyses.ablation.orders import swap_neighbours
    from streamlens.analyses.ablation.pairs import ablate_pairs
    from streamlens.analyses.ablation.repair import effects
    from streamlens.analyses.ablation.sweep import ablate

    if study == "swap":
        return swap_neighbours(source)
    if study == "effects":
        return effects(source, **options)
    if study == "blocks":
        return ablate_blocks(source, draw_seed=seed, **options)
    if study == "pairs":
        return ablate_pairs(source, draw_seed=seed, **options)
    if study == "greedy":
        return drop_greedily(source, draw_seed=seed, **options)
    return ablate(source, named or None, draw_seed=seed, **options)
