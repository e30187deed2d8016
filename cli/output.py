"""What commands print: rows as an aligned table or as one JSON object on stdout, notes on stderr."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import click

from streamlens.analyses.result import plain, scalar

SCHEMA = 1
"""Version of the JSON object: raised when a row's key changes its meaning or goes away."""

_GAP = "  "


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


def print_notes(notes: Iterable[str]) -> None:
    """Tell the user, on stderr, what was left out or assumed."""
    for note in notes:
        click.echo(f"note: {note}", err=True)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as aligned text under a heading: numbers to the right, text to the left.

    >>> print(table([{"kind": "attn", "cosine": 0.25}, {"kind": "mlp", "cosine": -1.0}]))
    kind  cosine
    attn    0.25
    mlp       -1
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[human(row.get(name)) for name in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    to_right = [all(_is_number(row.get(name)) for row in rows) for name in columns]

    def line(texts: Sequence[str]) -> str:
        padded = [
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(texts, widths, to_right, strict=True)
        ]
        return _GAP.join(padded).rstrip()

    return "\n".join([line(columns), *map(line, cells)])


def human(value: Any) -> str:
    """One cell: four digits of a float, thousands separated in a count, nothing as a dash, no control characters.

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
        return f"{value:.4g}"
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
