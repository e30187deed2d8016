"""What a study says in a few numbers, beside its rows: how well proxies rank, where to cut, whether others repair."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from streamlens.analyses.ablation.blocks import BlocksResult
from streamlens.analyses.ablation.repair import EffectsResult
from streamlens.analyses.ablation.sweep import AblationResult
from streamlens.analyses.statistics import interval_of

if TYPE_CHECKING:
    from streamlens.analyses.result import Result

Rows = list[dict[str, Any]]


def summaries(found: Result) -> dict[str, Rows]:
    """Return the tables that belong to a result beside its rows, by name.

    ``correlations`` of a sweep (`AblationResult.correlations`), ``best`` of contiguous blocks (`BlocksResult.best`),
    ``slope`` and ``response`` of effects; none for other studies, or where there is nothing to say.
    """
    tables: dict[str, Rows] = {}
    if isinstance(found, AblationResult):
        tables = {"correlations": found.correlations()}
    elif isinstance(found, BlocksResult):
        tables = {"best": found.best()}
    elif isinstance(found, EffectsResult):
        tables = {"slope": [slope_row(found)], "response": response_rows(found)}
    return {name: rows for name, rows in tables.items() if rows}


def slope_row(found: EffectsResult) -> dict[str, Any]:
    """Return the slope through zero of total on direct effect, with its 95 % interval.

    The interval is over the same draws of documents or windows as those of the effects (McGrath et al. 2307.15771 fit
    such a slope over layers).
    """
    scores = found.scores
    x, y = (scores.drawn[name] for name in ("direct", "total"))
    # Both are sums over the same tokens, so their number cancels out.
    low, high = interval_of((x * y).sum(0), (x * x).sum(0))
    ends = {"low": float(low), "high": float(high), "interval_over": scores.unit}
    return {"units": len(found.units), "slope_total_on_direct": found.slope, **ends}


def response_rows(found: EffectsResult) -> Rows:
    """Return what each later sublayer gives less without a unit, in logits, the largest first; negative: repairs."""
    table: Rows = [
        {"drop": unit.label, "answered_by": label, "response": float(found.response[index, sublayer])}
        for index, unit in enumerate(found.units)
        for sublayer, label in enumerate(found.labels)
        if sublayer > max(unit.sublayers)
    ]
    return sorted(table, key=lambda row: -abs(row["response"]))
