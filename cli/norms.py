"""`streamlens norms`: what every sublayer adds to the stream."""

from __future__ import annotations

import click

from streamlens.cli.analysis import OriginOptions, ShowOptions, analysis_options
from streamlens.cli.options import Sectioned
from streamlens.cli.output import human, print_notes
from streamlens.errors import UsageError


@click.command("norms", cls=Sectioned)
@analysis_options
@click.option("--heads", is_flag=True, help="Also every attention head; a capture needs --heads, too.")
@click.option(
    "--logits", is_flag=True, help="Also attribute the target's logit directly to every write, in the figure too."
)
@click.option("--layers-only", is_flag=True, help="Show the rows of whole layers alone.")
@click.option("--states", is_flag=True, help="Show the size of every state, what skips keep of it, and who stands out.")
@click.option("--cosines", is_flag=True, help="Show which writes point the same way, and which cancel each other.")
def command(
    origin: OriginOptions,
    show: ShowOptions,
    heads: bool,
    logits: bool,
    layers_only: bool,
    states: bool,
    cosines: bool,
) -> None:
    """Measure what every sublayer of SOURCE, a capture or a model, adds to the stream.

    rel_write is the size of the write over that of the state that it is added to, cosine the angle between the two;
    influence is 1 - cosine of the state before and after; proj_share is the share in the last state, exact, and adds up
    to 1 over embeddings, writes and biases. Means leave out position 0, whose size drowns all others in many models.
    The headings are short: --json, --csv and --parquet have the full names, all columns, medians and quartiles.

    \b
    Example:
      streamlens norms                       # the newest capture here
      streamlens norms model.h5 --plot norms.pdf
      streamlens norms model.pt --heads --logits --json
      streamlens norms model.h5 --states --plot depth.pdf
      streamlens norms model.h5 --cosines --json
    """  # noqa: D301 - click reads the \b
    rows_of_writes = {"--heads": heads, "--logits": logits, "--layers-only": layers_only}
    given = [name for name, asked in rows_of_writes.items() if asked]
    if states and cosines:
        raise UsageError("--states and --cosines are two tables: ask for one")
    if (states or cosines) and given:
        raise UsageError(f"{', '.join(given)} choose rows of writes, which --states and --cosines do not show")
    from streamlens.analyses.norms.door import contribution_norms

    result = contribution_norms(origin.open(heads=heads), heads=heads, logits=logits)
    if states:
        print_notes([f"the mean size grows by a factor of {human(result.states.growth)} in each layer"])
        show.show("norms", result.states, result.states.short_rows())
    elif cosines:
        show.show("norms", result.cosines, result.cosines.short_rows())
    else:
        show.show("norms", result, result.short_rows(layers_only=layers_only))
