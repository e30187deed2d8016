"""`streamlens report`: everything about one capture on one page."""

from __future__ import annotations

from pathlib import Path

import click

from streamlens.cli.analysis import OriginOptions, origin_options
from streamlens.cli.capture import Numbers
from streamlens.cli.options import OutFile
from streamlens.cli.output import print_notes


@click.command("report")
@origin_options
@click.option("-o", "--out", type=OutFile(".html"), help="The page. [default: the capture's own name with .html]")
@click.option("--only", multiple=True, metavar="SECTION", help="Leave out all other sections; may be repeated.")
@click.option("--sample", type=int, help="Tokens for the lens and the ablation. [default: fewer for larger models]")
@click.option("--doc", type=int, help="Document of the lens grid. [default: the first]")
@click.option("--positions", type=Numbers(), default="0-39", show_default=True, help="Positions of the lens grid.")
@click.option("--quiet", is_flag=True, help="No progress bars.")
def command(
    origin: OriginOptions,
    out: Path | None,
    only: tuple[str, ...],
    sample: int | None,
    doc: int | None,
    positions: tuple[int, ...],
    quiet: bool,
) -> None:
    """Write one HTML page about a capture: the stream, the lens token by token, ablation, position, gradient.

    The page needs no network and no server; each figure has its numbers as a table to download. SOURCE is a capture;
    without one it is the newest here.

    \b
    Example:
      streamlens report model.h5 -o report.html
    """  # noqa: D301 - click reads the \b
    from streamlens.analyses.report.door import report
    from streamlens.analyses.report.sections import SECTIONS

    written = report(
        origin.open(),
        out,
        sections=only or tuple(SECTIONS),
        tokens=sample,
        positions=positions,
        doc=doc,
        progress=not quiet,
        tell=lambda text: print_notes([text]),
    )
    size = written.stat().st_size / 1e6
    print_notes([f"wrote {written}, {size:.1f} MB: open it in any browser"])
