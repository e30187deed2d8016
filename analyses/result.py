"""What every answer can do: become a table, draw itself, be saved, show itself in a notebook."""

from __future__ import annotations

import html
import io
import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamlens.errors import UsageError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

FIGURES = (".png", ".svg", ".pdf")
TABLES = (".csv", ".parquet", ".json")


class Result(ABC):
    """Base of all results; each is a frozen dataclass of arrays."""

    title: str
    """What was asked, of which model and text; the title of the figure."""

    @abstractmethod
    def rows(self) -> list[dict[str, Any]]:
        """Return the table as plain rows; the keys are words, with the unit where there is one."""

    @abstractmethod
    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the main figure into `ax`, or into a new figure."""

    def to_frame(self) -> pd.DataFrame:
        """Return the table."""
        import pandas as pd

        return pd.DataFrame(self.rows())

    def save(self, path: str | Path) -> Path:
        """Write the figure (.png, .svg, .pdf) or the table (.csv, .parquet, .json), as the suffix says.

        Raises:
            UsageError: another suffix, or a format whose library is not installed.
        """
        path = Path(path)
        if path.suffix in FIGURES:
            from streamlens.analyses.figures import save_figure

            save_figure(self.plot(), path)
        elif path.suffix == ".csv":
            self.to_frame().to_csv(path, index=False)
        elif path.suffix == ".parquet":
            try:
                self.to_frame().to_parquet(path, index=False)
            except ImportError as error:
                raise UsageError(f"{path}: writing Parquet needs pyarrow (pip install pyarrow), or use .csv") from error
        elif path.suffix == ".json":
            path.write_text(json.dumps(self.rows(), default=_plain, indent=1), encoding="utf-8")
        else:
            raise UsageError(f"{path}: save to one of {', '.join([*FIGURES, *TABLES])}")
        return path

    def _repr_html_(self) -> str:
        from streamlens.analyses.figures import save_figure

        drawn = io.StringIO()
        save_figure(self.plot(), drawn)
        picture = drawn.getvalue()
        frame = self.to_frame()
        table = frame.head(8).to_html(index=False, border=0, float_format=lambda v: f"{v:.4g}")
        more = f"<p>{len(frame):,} rows: <code>to_frame()</code> has all of them</p>" if len(frame) > 8 else ""
        return (
            f"<figure style='max-width:52em'>{picture[picture.index('<svg') :]}</figure>"
            f"<details><summary>{html.escape(self.title)}</summary>{table}{more}</details>"
        )


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)
