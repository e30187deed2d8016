"""`streamlens compare`: two captures side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from streamlens.cli.analysis import ShowOptions, show_options
from streamlens.cli.options import Sectioned
from streamlens.cli.output import human, print_notes
from streamlens.errors import MissingDataError

if TYPE_CHECKING:
    from streamlens.analyses.compare.answer import Comparison, MovedResult

_MOVED = "label", "kind", "distance", "cosine", "cosine_low", "cosine_high"

_capture = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command("compare", cls=Sectioned)
@click.argument("first", type=_capture)
@click.argument("second", type=_capture)
@click.option(
    "--measure",
    default="relative_write",
    show_default=True,
    help="relative_write, cosine, growth, block_influence, proximity, projection_share, write_norm, read_norm or "
    "final_frame_norm; --json has all of them.",
)
@click.option("--moved", is_flag=True, help="Show how far each state and write is from the other model's instead.")
@click.option("--stream", help="Which stream of both. [default: the one that the head reads]")
@show_options
def command(first: Path, second: Path, measure: str, moved: bool, stream: str | None, show: ShowOptions) -> None:
    """Set capture SECOND beside capture FIRST: what each sublayer writes in both, and how they differ.

    Differences are second less first, with 95 % intervals: paired where both saw the same tokens. Other depths are
    aligned by relative depth.

    \b
    Example:
      streamlens compare base.h5 tuned.h5
      streamlens compare base.h5 tuned.h5 --measure cosine --plot cosine.pdf
      streamlens compare base.h5 tuned.h5 --moved
      streamlens report base.h5 --against tuned.h5
    """  # noqa: D301 - click reads the \b
    from streamlens.analyses.compare.door import compare

    found = compare(first, second, measure=measure, stream=stream)
    print_notes(_notes(found))
    about = {name: getattr(found, name) for name in ("names", "paired", "says", "over", "loss")}
    if found.similarity is not None:
        about["similarity"] = found.similarity.rows()
    if not moved:
        show.show("compare", found, _short(found), about=about)
    elif found.moved is None:
        raise MissingDataError(
            "vectors can be compared only where both captures saw the same tokens through streams of the same shape: "
            "leave out --moved, or capture both with the same --tokens"
        )
    else:
        show.show("compare", found.moved, _moved(found.moved), about=about)


def _notes(found: Comparison) -> list[str]:
    clear, count = found.clear()
    notes = [f"{found.names[0]} is first, {found.names[1]} second", *found.says]
    if found.loss is not None:
        loss = {name: human(value) for name, value in found.loss.items()}
        known = f" ({loss['low']} to {loss['high']})" if found.loss["low"] <= found.loss["high"] else ""
        notes.append(f"loss {loss['first']} and {loss['second']} nats per token: {loss['difference']}{known}")
    if found.similarity is not None:
        cka = found.similarity.cka
        notes.append(f"states of the layers are alike to CKA {cka.min():.2f} (least) and {cka[-1]:.2f} (the last)")
    notes.append(f"{found.measure}: for {clear} of {count} sublayers the interval leaves out 0; {found.certainty}")
    return notes


def _short(found: Comparison) -> list[dict[str, Any]]:
    """The columns that fit a terminal."""
    names = "label", "other_label", "first", "second", "difference", "low", "high"
    rows = found.rows_of(found.measure)
    alike = all(row["label"] == row["other_label"] for row in rows)
    return [{name: row[name] for name in names if not (alike and name == "other_label")} for row in rows]


def _moved(found: MovedResult) -> list[dict[str, Any]]:
    """The columns that fit a terminal."""
    return [{name: row[name] for name in _MOVED} for row in found.rows()]
