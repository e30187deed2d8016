"""What commands print: rows as a table that fits 80 columns, or as one JSON object, on stdout; notes on stderr."""

from __future__ import annotations

import json
import logging
import math
import os
import textwrap
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import click

from streamlens.analyses.result import plain, scalar
from streamlens.progress import silent

SCHEMA = 1
"""Version of the JSON object: raised when a row's key changes its meaning or goes away."""

WIDTH = 80
"""Columns that everything fits, whatever the terminal is: what is printed does not depend on who reads it."""

LOGGER = logging.getLogger("streamlens")
"""What the library tells; the command line shows its warnings as notes, and the rest with --verbose."""

_GAP = "  "

HEADINGS = {
    "relative_write": "rel_write",
    "block_influence": "influence",
    "projection_share": "proj_share",
    "final_frame_norm": "final_norm",
    "logit_attribution": "logit_attr",
    "r_squared_control": "r2_control",
    "mean_absolute_error": "mean_error",
}
"""What tables call the columns whose names are much wider than their numbers; elsewhere they keep their names."""


def print_rows(
    command: str,
    rows: Sequence[Mapping[str, Any]],
    *,
    as_json: bool,
    about: Mapping[str, Any] | None = None,
    more: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
) -> None:
    """Print the rows of a command to stdout, as a table or as `{"schema": 1, "command": ..., "rows": [...]}`.

    Args:
        command: name of the command.
        rows: the table.
        as_json: as one JSON object instead.
        about: what is true of all rows; in JSON only, under the key of this name.
        more: further tables by name: below the first one, or under these keys of the JSON object.
    """
    others = more or {}
    if as_json:
        payload: dict[str, Any] = {"schema": SCHEMA, "command": command}
        payload |= {} if about is None else {"about": plain(about)}
        payload |= {"rows": plain(list(rows))} | {name: plain(list(other)) for name, other in others.items()}
        click.echo(json.dumps(payload, allow_nan=False))
        return
    for name, other in (("", rows), *others.items()):
        if other:
            heading, lines = table(other).split("\n", 1)
            click.echo(f"\n{name}:" if name else "", nl=bool(name))
            click.echo(f"{bold(heading)}\n{lines}")
            if left_out := _fitting(other)[1]:
                print_notes([f"{', '.join(left_out)}: left out of the table for its width; --json has all columns"])


def print_record(command: str, row: Mapping[str, Any], *, as_json: bool) -> None:
    """Print the one row of a command: a line for each value, or as JSON the same as `print_rows`."""
    if as_json:
        print_rows(command, [row], as_json=True)
        return
    width = max(map(len, row))
    for name, value in row.items():
        click.echo(f"{bold(name.ljust(width))}{_GAP}{human(value)}")


def wrapped(text: str, indent: str = "  ") -> str:
    """Break lines at blanks so that they fit; what has no blank, such as a path, stays whole.

    Args:
        text: one or more lines, each of which is wrapped by itself.
        indent: what the second and later lines of each begin with.

    >>> print(wrapped("note: " + "word " * 15 + "a/path"))
    note: word word word word word word word word word word word word word word word
      a/path
    """
    wrapper = textwrap.TextWrapper(
        WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False, drop_whitespace=True
    )
    return "\n".join(wrapper.fill(line) for line in text.split("\n"))


def print_notes(notes: Iterable[str]) -> None:
    """Tell the user, on stderr, what was left out or assumed; not under --quiet."""
    for note in notes:
        tell(f"note: {note}")


def tell(text: str) -> None:
    """Print a line to stderr, unless --quiet."""
    if not silent():
        click.echo(wrapped(text), err=True)


@contextmanager
def stage(done: str) -> Iterator[None]:
    """With --verbose, say what was done and how long it took."""
    started = time.perf_counter()
    yield
    detail(f"{done}, in {time.perf_counter() - started:.2f} s")


def detail(text: str) -> None:
    """Say something that only --verbose shows."""
    LOGGER.info("%s", text)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as aligned text under a heading: numbers to the right, text to the left.

    >>> print(table([{"kind": "attn", "cosine": 0.25}, {"kind": "mlp", "cosine": -1.0}]))
    kind  cosine
    attn    0.25
    mlp       -1
    """
    return _fitting(rows)[0]


def _fitting(rows: Sequence[Mapping[str, Any]]) -> tuple[str, list[str]]:
    """Return the table, made to fit, and the columns that were left out for it.

    First digits go, then columns from the right: a table lists what was asked for first.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    for count in range(len(columns), 0, -1):
        for digits in (4, 3):
            made = _aligned(rows, columns[:count], digits)
            if max(map(len, made.split("\n"))) <= WIDTH:
                return made, columns[count:]
    return made, columns[1:]


def _aligned(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], digits: int) -> str:
    headings = [HEADINGS.get(name, name) for name in columns]
    cells = [[human(row.get(name), digits) for name in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(headings, *cells, strict=True)]
    to_right = [all(_is_number(row.get(name)) for row in rows) for name in columns]

    def line(texts: Sequence[str]) -> str:
        padded = [
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(texts, widths, to_right, strict=True)
        ]
        return _GAP.join(padded).rstrip()

    return "\n".join([line(headings), *map(line, cells)])


def human(value: Any, digits: int = 4) -> str:
    """One cell: so many digits of a float, thousands separated in a count, nothing as a dash, no control characters.

    >>> human(12345), human(0.000123456), human(None)
    ('12,345', '0.0001235', '-')
    """
    value = scalar(value)
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.{digits}g}"
    # Labels come from files that strangers wrote: an escape sequence in one must not reach the terminal.
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(value))


def human_count(n: float) -> str:
    """A large number with a short suffix.

    >>> human_count(999), human_count(134_515_008)
    ('999', '134.5 M')
    """
    units = ["k", "M", "G", "T"]
    if n < 1000:
        return f"{n:.0f}"
    n /= 1000
    # 999.95 would be rounded to 1000.0 of the smaller unit.
    while n >= 999.95 and len(units) > 1:
        n /= 1000
        units.pop(0)
    return f"{n:.1f} {units[0]}"


def bold(text: str) -> str:
    """Bold where stdout is a terminal and the user has not set NO_COLOR (click strips the code elsewhere)."""
    return text if os.environ.get("NO_COLOR") else click.style(text, bold=True)


def _is_number(value: Any) -> bool:
    value = scalar(value)
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
