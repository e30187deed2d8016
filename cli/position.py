"""`streamlens position`: how much of each state is position, and who carries it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from streamlens.cli.analysis import OriginOptions, ShowOptions, analysis_options
from streamlens.cli.output import print_notes
from streamlens.errors import UsageError

if TYPE_CHECKING:
    from streamlens.analyses.source import Source


@click.command("position")
@analysis_options
@click.option(
    "--positions",
    type=click.IntRange(min=2),
    help="Positions of each window that are looked at, from 0. [default: all, at most 128]",
)
@click.option("--include-first", is_flag=True, help="Count position 0 in the headline numbers.")
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
    probes: bool,
    lesion: bool,
    documents: int | None,
    **of_lesion: Any,
) -> None:
    """Measure how much of each state is position, and whether the skip carried it or sublayers wrote it.

    A state is split into mean, position, context and rest. share is that of the positional part in the energy around
    the mean, corrected for its bias; above null_high it is more than positions in random order give. retention is how
    much of the position embedding is left. The columns after it say where the positional part comes from and add up
    to 1: what the skip carried from the embedding, and what each kind of sublayer wrote. Position 0 does not count
    unless --include-first. --json has more columns.

    \b
    Example:
      streamlens position --plot position.png      # the newest capture here
      streamlens position model.h5 --probes
      streamlens position model.h5 --lesion --at 3_attn_out
    """  # noqa: D301 - click reads the \b
    if probes and lesion:
        raise UsageError("--probes and --lesion exclude each other: pass one of them")
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
        _persistence(origin.open(), show, common)


_LESION_ONLY = {"skips": "at", "alphas": "alpha", "protect_first": "protect-first"}


def _persistence(source: Source, show: ShowOptions, options: dict[str, Any]) -> None:
    from streamlens.analyses.position.door import positional_persistence

    found = positional_persistence(source, **options)
    notes = [found.reading]
    if found.documents_left_out:
        notes.append(f"left out {found.documents_left_out} windows that are shorter than {found.positions + 1} tokens")
    print_notes(notes)
    show.show("position", found, found.short_rows())


def _probes(source: Source, show: ShowOptions, options: dict[str, Any], seed: int) -> None:
    from streamlens.analyses.position.probes import position_probes

    found = position_probes(source, sample_seed=seed, **options)
    train, test = found.tokens
    print_notes(
        [
            f"trained on {train:,} tokens and tested on {test:,} of other {found.split_by}s; guessing is off by "
            f"{found.mean_absolute_error_guess:.1f} tokens, and right about the bin in {found.chance:.0%}"
        ]
    )
    show.show("position", found, found.short_rows())


def _lesion(source: Source, show: ShowOptions, options: dict[str, Any], seed: int) -> None:
    from streamlens.analyses.position.lesion import position_lesion

    found = position_lesion(source, sample_seed=seed, **options)
    print_notes([f"unchanged, the positional share of the last state is {found.baseline[-1]:.4g}"])
    show.show("position", found, found.short_rows())
