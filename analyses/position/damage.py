"""What lesions of the skip do to position and to the output: tables and figures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from streamlens.analyses.position.energies import Estimates
from streamlens.analyses.position.theatre import Lesion
from streamlens.analyses.result import Result
from streamlens.analyses.statistics import Floats

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class LesionResult(Result):
    """What each lesion does to position in the states after it, and to the output. NaN where there is no number."""

    title: str
    lesions: tuple[Lesion, ...]
    """(lesion,)."""
    states: tuple[str, ...]
    """(state,)."""
    dimensions: NDArray[np.int64]
    """(lesion,) of the subspace that is removed; 0 where all is scaled."""
    energy_removed: Floats
    """(lesion,) mean squared norm of what the skip loses, over that of the state around its mean."""
    baseline: Floats
    """(state,) share of the positional part in the unchanged model."""
    null_high: Floats
    """(state,) what it would be at most if positions stood in random order."""
    position_share: Estimates
    """(lesion, state) the same share after the lesion; NaN for states before it. What a lesion takes away that is not
    position makes this grow: whether position is left is told by the next two."""
    left: Estimates
    """(lesion, state) energy of the positional part after the lesion, over that of the unchanged model; 1 where nothing
    is lost. NaN also where the unchanged model has no position above its null band."""
    over_control: Estimates
    """(lesion, state) for a lesion of the position subspace: `left`, over `left` after its random control; else NaN."""
    probe_states: NDArray[np.int64]
    """(lesion, 2) where position is read off: in the state that the lesion makes, and in the last."""
    probe_baseline: Floats
    """(lesion, 2) R^2 of a ridge regression to the position on the unchanged states, on held-out documents."""
    probe_refitted: Floats
    """(lesion, 2) of one that is trained anew on the states after the lesion: is position there in any form?"""
    probe_low: Floats
    probe_high: Floats
    """(lesion, 2) its 95 % interval, by bootstrap over the test documents."""
    probe_transferred: Floats
    """(lesion, 2) of the one trained on the unchanged states: is it there in the old form?"""
    score: str
    """Which score the next three are: ``delta_loss`` in nats per token, or ``pooled_distance`` without logits."""
    damage: Floats
    low: Floats
    high: Floats
    """(lesion,) mean and 95 % interval, by bootstrap over documents."""
    rounding: Floats
    """(lesion,) relative error of the damaged sum from rounding, in a model below 32 bits; 0 in float32."""

    def control_of(self, lesion: int) -> int | None:
        """Return the index of the random control of a lesion of the position subspace; None for other lesions."""
        own = self.lesions[lesion]
        same = [i for i, x in enumerate(self.lesions) if x.mode == "random" and x.step == own.step]
        return same[0] if own.mode == "position" and same else None

    def rows(self) -> list[dict[str, Any]]:
        """Return one row for each lesion; `after` is the state that it makes, `last` the last one."""
        rows = []
        for i, lesion in enumerate(self.lesions):
            row: dict[str, Any] = {
                "label": lesion.label,
                "mode": lesion.mode,
                "alpha": lesion.alpha if lesion.mode == "scale" else None,
                "dimensions": int(self.dimensions[i]),
                "energy_removed": float(self.energy_removed[i]),
            }
            for column, name in enumerate(("after", "last")):
                k = int(self.probe_states[i, column])
                row |= _columns(f"position_share_{name}", self.position_share, i, k)
                row[f"position_share_{name}_unchanged"] = float(self.baseline[k])
                row |= _columns(f"position_left_{name}", self.left, i, k)
                row |= _columns(f"position_left_{name}_over_control", self.over_control, i, k)
                row[f"r_squared_{name}"] = float(self.probe_refitted[i, column])
                row[f"r_squared_{name}_low"] = float(self.probe_low[i, column])
                row[f"r_squared_{name}_high"] = float(self.probe_high[i, column])
                row[f"r_squared_{name}_transferred"] = float(self.probe_transferred[i, column])
                row[f"r_squared_{name}_unchanged"] = float(self.probe_baseline[i, column])
            control = self.control_of(i)
            row |= {self.score: float(self.damage[i]), "low": float(self.low[i]), "high": float(self.high[i])}
            row[f"{self.score}_control"] = float("nan") if control is None else float(self.damage[control])
            rows.append({**row, "rounding": float(self.rounding[i])})
        return rows

    def short_rows(self) -> list[dict[str, Any]]:
        """Return the columns that fit a terminal."""
        names = {
            "label": "label",
            "mode": "mode",
            "alpha": "alpha",
            "position_left_after": "after",
            "position_left_last": "last",
            "position_left_last_over_control": "vs_control",
            "r_squared_last": "r_squared",
            self.score: self.score,
        }
        rows = [{short: row[name] for name, short in names.items()} for row in self.rows()]
        return [{k: None if isinstance(v, float) and np.isnan(v) else v for k, v in row.items()} for row in rows]

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw what is left of position in each state, after each selective lesion and after its control.

        In a figure of its own each skip has a panel, and below it one for the lesions that scale it (`plot_scale`).
        """
        from streamlens.analyses.position.drawing import draw_lesions, plot_lesions

        return draw_lesions(self) if ax is None else plot_lesions(self, ax)

    def plot_scale(self, ax: Axes | None = None) -> Axes:
        """Draw what is left of position in the last state against the factor on the skip."""
        from streamlens.analyses.position.drawing import plot_scale

        return plot_scale(self, ax)


def _columns(name: str, found: Estimates, lesion: int, state: int) -> dict[str, float]:
    return {
        f"{name}{suffix}": float(values[lesion, state])
        for suffix, values in (("", found.value), ("_low", found.low), ("_high", found.high))
    }
