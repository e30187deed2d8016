"""What stands on the page: sections of text, figures and tables, before any HTML."""

from __future__ import annotations

import csv
import io
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from streamlens.analyses.report.theme import themed_svg
from streamlens.analyses.result import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DIGITS, _SHOWN = 4, 200


@dataclass(frozen=True)
class Figure:
    """A drawing and what it shows."""

    name: str
    caption: str
    svg: str


@dataclass(frozen=True)
class Table:
    """The numbers behind a figure."""

    name: str
    file: str
    columns: tuple[str, ...]
    rows: tuple[Mapping[str, Any], ...]

    @property
    def address(self) -> str:
        """All rows with all digits, as an address that holds the file itself."""
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        return "data:text/csv;charset=utf-8;base64," + b64encode(text.getvalue().encode()).decode()

    @cached_property
    def shown(self) -> list[list[str]]:
        """The first rows, rounded for the eye."""
        return [[_rounded(row.get(column)) for column in self.columns] for row in self.rows[:_SHOWN]]


@dataclass(frozen=True)
class Grid:
    """The lens token by token: the table that the page's script colours."""

    metrics: tuple[tuple[str, str], ...]
    heads: tuple[str, ...]
    """What is read at each position."""
    rows: tuple[Mapping[str, Any], ...]
    """From the last state down: ``name``, ``state`` and ``cells``, each with ``word`` and ``hit``."""
    through: str
    """What the states are read through."""
    target: str
    """What is bold: the token that came, or, where the model sees both sides, the token itself."""


@dataclass(frozen=True)
class Section:
    """One question, and what the capture says to it."""

    id: str
    name: str
    question: str
    answer: str = ""
    numbers: tuple[tuple[str, str], ...] = ()
    """What stands out: a number with its unit, and what it is."""
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()
    notes: tuple[str, ...] = ()
    stream: str = ""
    """SVG of the stream, wider than the page may be."""
    legend: tuple[tuple[str, str], ...] = field(default=())
    """Kind of sublayer and its name, for the colours of `stream`."""
    grid: Grid | None = None


def figure(axes: Axes, name: str, caption: str) -> Figure:
    """Return a drawing that takes the colours of the page."""
    return Figure(name, caption, themed_svg(axes, f"{name}. {caption}"))


def table(result: Result, name: str, file: str) -> Table:
    """Return all rows of a result."""
    return rows_table(result.rows(), name, file)


def rows_table(rows: Sequence[Mapping[str, Any]], name: str, file: str) -> Table:
    """Return rows whose columns are those of all of them, in order."""
    columns = tuple(dict.fromkeys(column for row in rows for column in row))
    return Table(name, file, columns, tuple(rows))


def _rounded(value: Any) -> str:
    if value is None or (isinstance(value, float) and value != value):
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.{_DIGITS}g}" if isinstance(value, float) else str(value)
