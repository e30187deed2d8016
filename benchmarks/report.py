"""The rows of the benchmark: as a table for people, as JSON for programs."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.agreement import Agreement
from benchmarks.memory import Memory
from streamlens.wording import human_bytes

_PACKAGES = ("residual-streamlens", "torch", "transformers", "h5py", "transformer-lens", "nnsight")
_HEADINGS = (
    *("contestant", "dtype", "time", "(lowest", "highest)", "of", "tokens/s"),
    *("peak memory", "10 x tokens", "written", "same numbers"),
)


@dataclass
class Row:
    """One contestant in one dtype."""

    contestant: str
    dtype: str
    reference: str = ""
    tokens: int = 0
    seconds: list[float] = field(default_factory=list)
    """Wall time of each round."""
    ratios: list[float] = field(default_factory=list)
    """That over the time of the reference in the same round."""
    written_bytes: int = 0
    agreement: Agreement | None = None
    """None where there is nothing to compare: nothing stored, or what the others are compared with."""
    memory: Memory | None = None
    memory_of_more: Memory | None = None
    """The same job on ten times the tokens."""
    notes: list[str] = field(default_factory=list)
    """Why a number is missing."""

    @property
    def tokens_per_second(self) -> float | None:
        """From the median time."""
        return self.tokens / statistics.median(self.seconds) if self.seconds else None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values; null where there is no measurement."""
        ratios, told, more = self.ratios, self.memory, self.memory_of_more
        return {
            "contestant": self.contestant,
            "dtype": self.dtype,
            "reference": self.reference,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "time_ratio": statistics.median(ratios) if ratios else None,
            "time_ratio_low": min(ratios, default=None),
            "time_ratio_high": max(ratios, default=None),
            "tokens_per_second": self.tokens_per_second,
            "peak_bytes": told.peak_bytes if told else None,
            "peak_tokens": told.tokens if told else None,
            "peak_bytes_of_more": more.peak_bytes if more else None,
            "peak_tokens_of_more": more.tokens if more else None,
            "written_bytes": self.written_bytes,
            "equal": self.agreement.equal if self.agreement else None,
            "largest_difference": self.agreement.difference if self.agreement else None,
            "relative_difference": self.agreement.relative if self.agreement else None,
            "notes": self.notes,
        }

    def cells(self) -> tuple[str, ...]:
        """Return the row of the table, in the order of its headings."""
        ratios, speed = self.ratios, self.tokens_per_second
        times = (statistics.median(ratios), min(ratios), max(ratios)) if ratios else ()
        return (
            *(self.contestant, self.dtype),
            *([f"{time:.3f}" for time in times] or ["", "", ""]),
            *(self.reference, f"{speed:.0f}" if speed else ""),
            *(human_bytes(found.peak_bytes) if found else "" for found in (self.memory, self.memory_of_more)),
            human_bytes(self.written_bytes) if self.written_bytes else "",
            str(self.agreement or ""),
        )


def machine() -> dict[str, str]:
    """Describe what the numbers were taken on."""
    found = {"cpu": _cpu(), "threads": str(torch.get_num_threads()), "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _cpu() -> str:
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor() or platform.machine()


def table(rows: Sequence[Row]) -> str:
    """Return the table, and below it why numbers are missing."""
    lines = [_HEADINGS, *(row.cells() for row in rows)]
    widths = [max(len(cells[column]) for cells in lines) for column in range(len(_HEADINGS))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip() for cells in lines]
    notes = [f"{row.contestant}, {row.dtype}: {note}" for row in rows for note in row.notes]
    about = ", ".join(f"{key} {value}" for key, value in machine().items())
    return "\n".join([*text, "", *notes, about])


def to_json(rows: Sequence[Row]) -> str:
    """Return one object with all rows."""
    values = {"schema": 1, "command": "benchmarks.capture", "machine": machine(), "rows": [r.to_dict() for r in rows]}
    return json.dumps(values, indent=1)
