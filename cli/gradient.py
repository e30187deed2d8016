"""`streamlens gradient`: what comes back over the skip, and what through the branch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from streamlens.cli.analysis import OriginOptions, ShowOptions, analysis_options
from streamlens.cli.options import Sectioned
from streamlens.cli.output import human, print_notes
from streamlens.wording import counted

if TYPE_CHECKING:
    from streamlens.analyses.gradient.answer import GradientResult
    from streamlens.analyses.gradient.paths import SpectrumResult

_FLOW = ("label", "skip_share", "branch_share", "low", "high", "relative_norm")
_PATHS = ("length", "share", "low", "high", "relative_norm", "energy_share", "binomial")


@click.command("gradient", cls=Sectioned)
@analysis_options
@click.option("--paths", is_flag=True, help="By path length instead: how many branches the gradient passed.")
@click.option(
    "--max-length", type=click.IntRange(min=0), help="With --paths: longer ones are not told apart. [default: 12]"
)
@click.option(
    "--sequences", type=click.IntRange(min=1), help="Run so many windows, evenly spread. [default: 32; --paths 8]"
)
@click.option("--all", "everything", is_flag=True, help="Run all windows.")
@click.option("--at-once", type=click.IntRange(min=1), help="Windows in memory at once. [default: 4; --paths 2]")
def command(
    origin: OriginOptions,
    show: ShowOptions,
    paths: bool,
    max_length: int | None,
    sequences: int | None,
    everything: bool,
    at_once: int | None,
) -> None:
    """Split the gradient of the loss, at every sublayer, into what came back over the skip and through the branch.

    The model of SOURCE is run forwards and backwards. Shares of a step add up to 1. With --paths, the gradient at
    the embedding is sorted by the number of branches that it passed, exactly and over all paths at once.

    \b
    Example:
      streamlens gradient model.h5 --plot gradient.pdf
      streamlens gradient model.pt --text book.txt --sequences 8
      streamlens gradient model.h5 --paths --max-length 8 --json
    """  # noqa: D301 - click reads the \b
    from streamlens.errors import UsageError

    if max_length is not None and not paths:
        raise UsageError("--max-length goes with --paths")
    if everything and sequences is not None:
        raise UsageError("--all and --sequences contradict each other")
    options: dict[str, Any] = {"sequences": None} if everything else {}
    given = {"max_length": max_length, "sequences": sequences, "at_once": at_once}
    options |= {name: value for name, value in given.items() if value is not None}
    if paths:
        _by_length(origin, show, options)
    else:
        _by_sublayer(origin, show, options)


def _by_sublayer(origin: OriginOptions, show: ShowOptions, options: dict[str, Any]) -> None:
    from streamlens.analyses.gradient.door import gradient_flow

    found = gradient_flow(origin.open(), **options)
    columns = (*_FLOW, "norm_gain") if found.has_norms else _FLOW
    show.show("gradient", found, [{name: row[name] for name in columns} for row in found.rows()])
    print_notes([*_about(found), f"skip and branches add up to the gradient within {human(found.closure)} of its norm"])


def _by_length(origin: OriginOptions, show: ShowOptions, options: dict[str, Any]) -> None:
    from streamlens.analyses.gradient.paths import path_spectrum

    found = path_spectrum(origin.open(), **options)
    show.show("gradient", found, [{name: row[name] for name in _PATHS} for row in found.rows()])
    longest, paths = found.lengths[-1], found.paths
    mean, most = human(float(paths.mean_length[0])), len(found.branches)
    told = (
        f"paths of more than {longest} branches carry {human(float(paths.remainder_share[0]))} of the gradient"
        if longest < most
        else f"all lengths add up to the gradient within {human(float(paths.remainder_norm[0]))} of its norm"
    )
    notes = [f"mean path length {mean} of at most {most}; {told}"]
    if longest < most and abs(float(paths.remainder_share[0])) > 0.05:
        notes.append(f"--max-length {most} tells all of them apart")
    largest = float(paths.relative_norm[:, 0].max())
    if largest > 2:
        notes.append(
            f"paths of different lengths cancel: those of one length are up to {human(largest)} times the gradient"
        )
    print_notes([*_about(found), *notes])


def _about(found: GradientResult | SpectrumResult) -> list[str]:
    from streamlens.analyses.gradient.answer import OBJECTIVES

    sequences, documents = counted(found.sequences, "sequence"), counted(found.documents, "document")
    return [
        f"differentiated: {OBJECTIVES[found.objective]}, {human(float(found.loss[0]))}, {sequences} of {documents}; "
        "position 0 is left out of the table"
    ]
