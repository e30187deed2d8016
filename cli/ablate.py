"""`streamlens ablate`: leave layers out and see what the model loses."""

from __future__ import annotations

from typing import Any

import click

from streamlens.cli.analysis import OriginOptions, ShowOptions, analysis_options
from streamlens.cli.capture import Numbers
from streamlens.cli.output import print_notes

SHORT = ("drop", "mode", "delta_loss", "low", "high", "kl", "top1_agreement", "perplexity_ratio", "pooled_distance")


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
    default="skip",
    show_default=True,
    help="skip: the state stays as it is. zero: nothing is written. mean: the mean write. resample: the write made in "
    "another document.",
)
@click.option("--per-position", is_flag=True, help="In --mode mean: a mean for each position.")
@click.option("--protect-first", is_flag=True, help="Leave position 0 (the attention sink) as it is.")
def command(
    origin: OriginOptions,
    show: ShowOptions,
    layers: tuple[tuple[int, ...], ...],
    names: tuple[str, ...],
    **options: Any,
) -> None:
    """Leave layers or sublayers out and measure what the model loses.

    With nothing named, every layer and every sublayer is dropped by itself. The model itself is not changed: it is
    edited while it runs, from the states in the capture. The loss is in nats per token, without position 0; low and
    high are a 95 % interval over documents.

    \b
    Example:
      streamlens capture model.pt && streamlens ablate --drop-layer 7
      streamlens ablate --plot sweep.png
      streamlens ablate model.h5 --drop 3.attn --drop 4.attn --mode mean --json
    """  # noqa: D301 - click reads the \b
    named = [*(str(n) for group in layers for n in group), *names]
    _ablate(origin, show, named, options)


def _ablate(origin: OriginOptions, show: ShowOptions, named: list[str], options: dict[str, Any]) -> None:
    from streamlens.analyses.ablation.sweep import ablate

    found = ablate(origin.open(), named or None, draw_seed=origin.model.seed, **options)
    if found.scores.headline == "delta_loss":
        print_notes([f"loss of the whole model: {found.scores.base_loss:.4f} nats per token"])
    show.show("ablate", found, [{k: v for k, v in row.items() if k in SHORT} for row in found.rows()])
