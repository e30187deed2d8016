"""`streamlens verify`: trust a capture only as far as it can be checked."""

from __future__ import annotations

from pathlib import Path

import click

from streamlens.cli.options import Sectioned, output_options
from streamlens.cli.output import print_record


@click.command("verify", cls=Sectioned)
@click.argument("capture", type=click.Path(path_type=Path))
@output_options
def command(capture: Path, as_json: bool) -> None:
    """Compute every hash of CAPTURE again, and add its writes up again to its stored states.

    Exit code 4 when anything differs.

    \b
    Example:
      streamlens verify model.h5
    """  # noqa: D301 - click reads the \b
    from streamlens.progress import Progress
    from streamlens.reader.opening import open_capture
    from streamlens.reader.verifying import verify

    with open_capture(capture) as opened:
        total = opened.n_tokens * len(opened.streams)
    with Progress(total, "verify") as bar:
        found = verify(capture, on_block=bar.update)
    row = {
        "path": str(capture),
        "damaged": len(found.problems),
        "blocks": found.blocks,
        "exact_blocks": found.exact_blocks,
        "states_compared": found.states,
        "worst_error": found.worst,
        "where": found.where or None,
    }
    print_record("verify", row, as_json=as_json)
    found.demand()
