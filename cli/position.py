"""`streamlens position`: how much of each state is position, and who carries it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from streamlens.cli.analysis import OriginOptions, ShowOptions, analysis_options
from streamlens.cli.options import Sectioned
from streamlens.cli.output import print_notes
from streamlens.errors import UsageError

if TYPE_CHECKING:
    from streamlens.analyses.source import Source


@click.command("position", cls=Sectioned)
@analysis_options
@click.option(
    "--positions",
    type=click.IntRange(min=2),
    help="Positions of each window that are looked at, from 0. [default: so many as half of them have, at most 128]",
)
@click.option("--include-first", is_flag=True, help="Count position 0 in the headline numbers.")
@click.option("--origin", "by_term", is_flag=True, help="Say which sublayer wrote the positional part of each state.")
@click.option("--probes", is_flag=True, help="Train linear probes for position instead.")
@click.option("--lesion", is_flag=True, help="Damage the skip instead and see whether position comes back.")
@click.option(
    "--at", "skips", multiple=True, help="With --lesion: the skip around this sublayer, such as 3_attn_out. Repeatable."
)
@click.option(
    "--alpha", "alphas", type=float, multiple=True, help="With --lesion: factor on the skip. [default: 1, 0.9, 0.5, 0]"
)
@click.option("--protect-first", is_flag=True, help="With --lesion: leave the skip of position 0 as it is.")
@click.option("--documents", type=click.IntRange(min=6), help="With --probes or --lesion: windows used. [default: 64]")
def command(
    origin: OriginOptions,
    show: ShowOptions,
    positions: int | None,
    include_first: bool,
    by_term: bool,
    probes: bool,
    lesion: bool,
    documents: int | None,
    **of_lesion: Any,
) -> None:
    """Measure how much of each state is position, and whether the skip carried it or sublayers wrote it.

    A state is split into mean, position, context and rest. share is that of the positional part in the energy around
    the mean, corrected for its bias; above null_high it is more than positions in random order give. retention is how
    much of the position embedding is left. The columns after it say where the positional part comes from and add up
    to 1: what the skip carried from the embedding, and what each kind of sublayer wrote (--origin: each sublayer; below
    0 it took away). Position 0 does not count unless --include-first. --json has more columns, with intervals.

    \b
    Example:
      streamlens position --plot position.png      # the newest capture here
      streamlens position model.h5 --origin --csv origin.csv
      streamlens position model.h5 --probes
      streamlens position model.h5 --lesion --at 3_attn_out
    """  # noqa: D301 - click reads the \b
    asked = [f"--{name}" for name, on in (("origin", by_term), ("probes", probes), ("lesion", lesion)) if on]
    if len(asked) > 1:
        raise UsageError(f"{' and '.join(asked)} exclude each other: pass one of them")
    named = [f"--{flag}" for name, flag in _LESION_ONLY.items() if of_lesion[name]]
    if named and not lesion:
        raise UsageError(f"{', '.join(named)}: only with --lesion")
    if documents is not None and not (probes or lesion):
        raise UsageError("--documents: only with --probes or --lesion; use --max-tokens")
    common: dict[str, Any] = {"positions": positions, "include_first": include_first}
    if documents is not None:
        common["documents"] = documents
    if probes:
        _probes(origin.open(), show, common, origin.model.seed)
    elif lesion:
        given = {name: value for name, value in of_lesion.items() if value}
        _lesion(origin.open(), show, common | given, origin.model.seed)
    else:
        _persistence(origin.open(), show, common, by_term)


MOST_ROUNDING = 0.01
"""Relative error of a damaged sum that is not worth a word."""

_LESION_ONLY = {"skips": "at", "alphas": "alpha", "protect_first": "protect-first"}


def _persistence(source: Source, show: ShowOptions, options: dict[str, Any], by_term: bool) -> None:
    from streamlens.analyses.position.door import positional_persistence

    found = positional_persistence(source, **options)
    print_notes([found.reading, f"measured on {found.scope}"])
    shown: Any = found.origins if by_term else found
    show.show("position", shown, shown.short_rows())


def _probes(source: Source, show: ShowOptions, options: dict[str, Any], seed: int) -> None:
    from streamlens.analyses.position.probes import position_probes

    found = position_probes(source, sample_seed=seed, **options)
    train, test = found.tokens
    print_notes(
        [
            f"trained on {train:,} tokens and tested on {test:,} of other {found.split_by}s; guessing is off by "
            f"{found.mean_absolute_error_guess:.1f} tokens, and right about the bin in {100 * found.chance:.0f} %"
        ]
    )
    show.show("position", found, found.short_rows())


def _lesion(source: Source, show: ShowOptions, options: dict[str, Any], seed: int) -> None:
    from streamlens.analyses.position.lesion import position_lesion

    found = position_lesion(source, sample_seed=seed, **options)
    notes = [
        "after, last: energy of the positional part in the state after the lesion and in the last one, over that of "
        "the unchanged model; vs_control: the latter over what the random control leaves"
    ]
    if found.rounding.max() > MOST_ROUNDING:
        notes.append(
            f"the sums that are damaged are off by up to {100 * found.rounding.max():.0f} % from rounding in this "
            "dtype: use --dtype float32"
        )
    print_notes(notes)
    show.show("position", found, found.short_rows())
