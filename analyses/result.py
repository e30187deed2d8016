"""What every answer can do: become a table, draw itself, be saved, show itself in a notebook."""

from __future__ import annotations

import html
import importlib.util
import io
import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamlens.errors import StorageError, UsageError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

FIGURES = (".png", ".svg", ".pdf")
TABLES = (".csv", ".parquet", ".json")


class Result(ABC):
    """Base of all results; each is a frozen dataclass of arrays."""

    title: str
    """What was asked, of which model and text; the title of the figure."""

    def __init_subclass__(cls, **options: Any) -> None:
        """Give every result the one line below: a dataclass makes a text of its own, with all arrays in it."""
        super().__init_subclass__(**options)
        cls.__repr__ = Result.__repr__  # type: ignore[method-assign]

    def __repr__(self) -> str:
        """Return what was asked, in one line."""
        return f"<{type(self).__name__}{': ' * bool(self.title)}{self.title}>"

    @abstractmethod
    def rows(self) -> list[dict[str, Any]]:
        """Return the table as plain rows; the keys are words, with the unit where there is one."""

    def short_rows(self) -> list[dict[str, Any]]:
        """Return the columns that fit a page: all, where the result does not choose."""
        return self.rows()

    @abstractmethod
    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the main figure into `ax`, or into a new figure."""

    def to_frame(self) -> pd.DataFrame:
        """Return the table."""
        import pandas as pd

        return pd.DataFrame(self.rows())

    def save(self, path: str | Path) -> Path:
        """Write the figure (.png, .svg, .pdf) or the table (.csv, .parquet, .json), as the suffix says.

        Numbers that are not finite are null in JSON.

        Raises:
            StorageError: the disk is full, or will not be written to.
            UsageError: as `checked_target`.
        """
        path = checked_target(path)
        try:
            if path.suffix in FIGURES:
                from streamlens.analyses.figures import save_figure

                save_figure(self.plot(), path)
            elif path.suffix == ".csv":
                self.to_frame().to_csv(path, index=False)
            elif path.suffix == ".parquet":
                self.to_frame().to_parquet(path, index=False)
            else:
                text = json.dumps(plain(self.rows()), indent=1, allow_nan=False)
                path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise StorageError(f"{path} could not be written: {error.strerror or error}") from error
        return path

    def _repr_html_(self) -> str:
        import pandas as pd

        from streamlens.analyses.figures import save_figure

        drawn = io.StringIO()
        save_figure(self.plot(), drawn)
        picture = drawn.getvalue()
        rows = self.short_rows()
        frame = pd.DataFrame(rows).dropna(axis="columns", how="all")
        table = frame.head(8).to_html(index=False, border=0, na_rep="", float_format=lambda v: f"{v:.4g}")
        table = f"<div style='overflow-x:auto'>{table}</div>"
        more = f"<p>{len(rows):,} rows: <code>to_frame()</code> has all of them</p>" if len(rows) > 8 else ""
        return (
            f"<figure style='max-width:52em'>{picture[picture.index('<svg') :]}</figure>"
            f"<details><summary>{html.escape(self.title)}</summary>{table}{more}</details>"
        )


def checked_target(path: str | Path, suffixes: Sequence[str] = (*FIGURES, *TABLES)) -> Path:
    """Return the path if a result can be saved there, so that a mistake is told before the work and not after it.

    Args:
        path: a file to write.
        suffixes: those that it may have.

    Raises:
        UsageError: another suffix, no such folder, one that may not be written to, or a format whose library is not
            installed.
    """
    path = Path(path)
    if path.suffix not in suffixes:
        raise UsageError(f"{path}: save to one of {', '.join(suffixes)}")
    if path.is_dir():
        raise UsageError(f"{path} is a folder: name a file")
    if not path.parent.is_dir():
        raise UsageError(f"{path}: there is no folder {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UsageError(f"{path} may not be written: choose another place")
    if path.suffix == ".parquet" and not any(map(importlib.util.find_spec, ("pyarrow", "fastparquet"))):
        raise UsageError(f"{path}: writing Parquet needs pyarrow (pip install pyarrow), or use .csv")
    return path


def plain(value: Any) -> Any:
    """Return a value in JSON's own types; what is not a finite number becomes null, since JSON has no word for it.

    >>> import numpy as np
    >>> plain({"a": np.array([1.5, np.nan]), "b": (np.int64(2), None)})
    {'a': [1.5, None], 'b': [2, None]}
    """
    value = scalar(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)) or hasattr(value, "tolist"):
        return [plain(item) for item in (value.tolist() if hasattr(value, "tolist") else value)]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def scalar(value: Any) -> Any:
    """Return a numpy or torch scalar as the Python number that it holds, anything else as it is."""
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else value
