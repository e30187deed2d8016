"""`streamlens report`: everything about one capture on one page."""

from __future__ import annotations

from pathlib import Path

import click

from streamlens.cli.analysis import OriginOptions, origin_options
from streamlens.cli.capture import Numbers
from streamlens.cli.options import OutFile, Sectioned
from streamlens.cli.output import print_notes
from streamlens.wording import human_bytes


@click.command("report", cls=Sectioned)
@origin_options
@click.option("-o", "--out", type=OutFile(".html"), help="The page. [default: the capture's own name with .html]")
@click.option(
    "--against",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Another capture: a section says what differs.",
)
@click.option("--only", multiple=True, metavar="SECTION", help="Leave out all other sections; may be repeated.")
@click.option("--sample", type=int, help="Tokens for the lens and the ablation. [default: fewer for larger models]")
@click.option("--doc", type=int, help="Document of the lens grid. [default: the first]")
@click.option("--positions", type=Numbers(), default="0-39", show_default=True, help="Positions of the lens grid.")
def command(
    origin: OriginOptions,
    out: Path | None,
    against: Path | None,
    only: tuple[str, ...],
    sample: int | None,
    doc: int | None,
    positions: tuple[int, ...],
) -> None:
    """Write one HTML page about a capture: the stream, the lens token by token, ablation, position, gradient.

    The page needs no network and no server; each figure has its numbers as a table to download. SOURCE is a capture;
    without one it is the newest here.

    \b
    Example:
      streamlens report model.h5 -o report.html
      streamlens report base.h5 --against tuned.h5
    """  # noqa: D301 - click reads the \b
    from streamlens.analyses.report.door import report

    written = report(
        origin.open(),
        out,
        against=against,
        sections=only or None,
        tokens=sample,
        positions=positions,
        doc=doc,
        tell=lambda text: print_notes([text]),
    )
    print_notes([f"wrote {written}, {human_bytes(written.stat().st_size)}: open it in any browser"])
