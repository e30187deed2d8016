"""`streamlens ablate`: leave layers out and see what the model loses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from streamlens.cli.analysis import OriginOptions, ShowOptions, analysis_options
from streamlens.cli.capture import Numbers
from streamlens.cli.output import print_notes
from streamlens.errors import UsageError

if TYPE_CHECKING:
    from streamlens.analyses.result import Result
    from streamlens.analyses.source import Source

COLUMNS = {
    None: ("drop", "mode", "low", "high", "top1_agreement"),
    "blocks": ("start", "length", "mode", "low", "high"),
    "pairs": ("first", "second", "mode", "interaction", "low", "high"),
    "greedy": ("order", "dropped", "layer", "low", "high"),
    "swap": ("swap", "low", "high", "top1_agreement"),
    "effects": ("drop", "direct", "indirect", "norm_effect", "total", "low", "high"),
}
"""What the terminal's table shows besides the scores; --json, --csv and --parquet have all columns."""

SCORES = ("delta_loss", "kl", "pooled_distance")


@click.command("ablate")
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
    "another document. [default: skip]",
)
@click.option("--per-position", is_flag=True, help="In --mode mean: a mean for each position.")
@click.option("--protect-first", is_flag=True, help="Leave position 0 (the attention sink) as it is.")
@click.option("--blocks", "study", flag_value="blocks", help="Drop every contiguous block of layers: start by length.")
@click.option("--pairs", "study", flag_value="pairs", help="Drop every two layers, and say how they interact.")
@click.option("--swap", "study", flag_value="swap", help="Exchange each layer with the next one instead.")
@click.option(
    "--greedy", type=click.IntRange(min=1), metavar="K", help="Drop K layers one after the other, cheapest first."
)
@click.option(
    "--effects", "study", flag_value="effects", help="Direct, indirect and norm effect on the target's logit."
)
def command(
    origin: OriginOptions,
    show: ShowOptions,
    layers: tuple[tuple[int, ...], ...],
    names: tuple[str, ...],
    study: str | None,
    greedy: int | None,
    **options: Any,
) -> None:
    """Leave layers or sublayers out and measure what the model loses.

    With nothing named, every layer and every sublayer is dropped by itself. The model itself is not changed: it is
    edited while it runs, from the states in the capture. The loss is in nats per token, without position 0; low and
    high are a 95 % interval over documents. Where a norm follows the addition, skip and zero are both shown.

    \b
    Example:
      streamlens ablate --drop-layer 7             # the newest capture here
      streamlens ablate --plot sweep.png
      streamlens ablate model.h5 --drop 3.attn --drop 4.attn --mode mean --json
      streamlens ablate model.h5 --pairs --plot pairs.pdf
    """  # noqa: D301 - click reads the \b
    named = [*(str(n) for group in layers for n in group), *names]
    if greedy is not None:
        if study is not None:
            raise UsageError(f"--greedy and --{study} are two studies: pass one of them")
        study, options["count"] = "greedy", greedy
    if study is not None and named:
        raise UsageError(f"--{study} goes over all layers, so it cannot be combined with --drop-layer or --drop")
    result = _run(origin.open(), study, named, _given(study, options), origin.model.seed)
    columns = {*COLUMNS[study], *SCORES}
    show.show("ablate", result, [{k: v for k, v in row.items() if k in columns} for row in result.rows()])


def _given(study: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that a study takes; refuse those that it would have to ignore."""
    takes = {
        None: ("mode", "per_position", "protect_first"),
        "blocks": ("mode", "protect_first"),
        "pairs": ("mode", "protect_first"),
        "greedy": ("mode", "protect_first", "count"),
        "swap": (),
        "effects": (),
    }[study]
    given = {name: value for name, value in options.items() if value not in (None, False)}
    for name in given:
        if name not in takes:
            raise UsageError(f"--{study} cannot be combined with --{name.replace('_', '-')}")
    return given


def _run(source: Source, study: str | None, named: list[str], options: dict[str, Any], seed: int) -> Result:
    from streamlens.analyses.ablation.blocks import ablate_blocks
    from streamlens.analyses.ablation.greedy import drop_greedily
    from streamlens.analyses.ablation.orders import swap_neighbours
    from streamlens.analyses.ablation.pairs import ablate_pairs
    from streamlens.analyses.ablation.repair import effects
    from streamlens.analyses.ablation.sweep import ablate

    if study == "effects":
        return effects(source)
    if study == "swap":
        return swap_neighbours(source)
    if study == "blocks":
        return ablate_blocks(source, draw_seed=seed, **options)
    if study == "pairs":
        return ablate_pairs(source, draw_seed=seed, **options)
    if study == "greedy":
        return drop_greedily(source, draw_seed=seed, **options)
    found = ablate(source, named or None, draw_seed=seed, **options)
    if found.scores.headline == "delta_loss":
        print_notes([f"loss of the whole model: {found.scores.base_loss:.4f} nats per token"])
    return found
