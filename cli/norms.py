"""`streamlens norms`: what every sublayer adds to the stream."""

from __future__ import annotations

from typing import Any

import click

from streamlens.cli.analysis import OriginOptions, ShowOptions, analysis_options

_SHORT = ("label", "relative_write", "cosine", "block_influence", "proximity", "projection_share", "logit_attribution")


@click.command("norms")
@analysis_options
@click.option("--heads", is_flag=True, help="Also every attention head; a capture needs --heads, too.")
@click.option("--logits", is_flag=True, help="Also attribute the target's logit directly to every write.")
@click.option("--layers-only", is_flag=True, help="Show the rows of whole layers alone.")
def command(origin: OriginOptions, show: ShowOptions, heads: bool, logits: bool, layers_only: bool) -> None:
    """Measure what every sublayer of SOURCE, a capture or a model, adds to the stream.

    Means over tokens without position 0, whose size drowns all others in many models; --json has the medians,
    quartiles and the means over all tokens as well. projection_share adds up to 1 over embeddings, writes and biases.

    \b
    Example:
      streamlens norms                       # the newest capture here
      streamlens norms model.h5 --plot norms.pdf
      streamlens norms model.pt --heads --logits --json
    """  # noqa: D301 - click reads the \b
    from streamlens.analyses.norms.door import contribution_norms

    result = contribution_norms(origin.open(heads=heads), heads=heads, logits=logits)
    rows: list[dict[str, Any]] = []
    for row in result.rows():
        if not layers_only or row["kind"] == "layer":
            rows.append({key: row[key] for key in _SHORT if key != "logit_attribution" or logits})
    show.show("norms", result, rows)
