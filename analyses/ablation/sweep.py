"""Each layer and sublayer left out by itself, or what was named left out together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

from streamlens.analyses.ablation.proxies import Proxies, rank_correlation, rank_interval
from streamlens.analyses.ablation.runs import Dropped
from streamlens.analyses.ablation.scores import Scores
from streamlens.analyses.ablation.spans import Drop, Mode, chosen, every, in_modes
from streamlens.analyses.ablation.study import Options, Study, check_units
from streamlens.analyses.result import Result
from streamlens.analyses.source import Origin
from streamlens.analyses.statistics import Floats
from streamlens.rest import resting

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class AblationResult(Result):
    """What was dropped, and what it did; the axis ``drop`` counts the rows."""

    drops: tuple[Drop, ...]
    """(drop,) what was left out, and in which mode."""
    scores: Scores
    """Sums over tokens; `rows` has the means and intervals."""
    proxies: Mapping[str, Floats]
    """(drop,) block_influence, relative_write and angular_distance, from the states alone; may be empty."""
    title: str = ""

    def __getitem__(self, label: str) -> dict[str, Any]:
        """Return the row of this label, such as ``layer 7``, in the mode that was asked for.

        Raises:
            KeyError: there is none.
        """
        return next((row for row in self.rows() if row["drop"] == label), None) or _missing(label, self.drops)

    def rows(self) -> list[dict[str, Any]]:
        """Return one row for each drop.

        ``low`` and ``high`` are the 95 % interval of the first score that there is (delta_loss, else kl, else
        pooled_distance) over the documents or windows that ``interval_over`` names. Means leave out position 0; columns
        that end in ``_with_first`` do not.
        """
        table = score_rows(self.scores)
        for index, (row, drop) in enumerate(zip(table, self.drops, strict=True)):
            named = {"drop": drop.label, "kind": drop.kind, "layer": drop.layer, "mode": drop.mode}
            cheap = {name: float(values[index]) for name, values in self.proxies.items()}
            table[index] = named | row | cheap
        return table

    def correlations(self) -> list[dict[str, Any]]:
        """Return Spearman's rank correlation of each proxy with the score, over layers and over sublayers.

        Only where three or more of them were dropped one by one. ``low`` and ``high`` are its 95 % interval over the
        same draws of documents or windows as those of the scores; the proxies are held.
        """
        found, head = [], self.scores.headline
        score, drawn = self.scores.mean(head), self.scores.drawn.get(head, np.zeros((len(self.drops), 0)))
        for units in ("layer", "sublayer"):
            for mode in dict.fromkeys(d.mode for d in self.drops):
                rows = [
                    i
                    for i, d in enumerate(self.drops)
                    if d.mode == mode and d.kind != "several" and (d.kind == "layer") == (units == "layer")
                ]
                for name, values in self.proxies.items() if len(rows) > 2 else ():
                    rho, p = rank_correlation(values[rows], score[rows])
                    low, high = rank_interval(values[rows], drawn[rows])
                    row = {"proxy": name, "over": units, "mode": mode, "score": head, "count": len(rows)}
                    found.append(row | {"spearman": rho, "low": low, "high": high, "p_value": p})
        return found

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the score by layer, with its interval, for whole layers and for each kind of sublayer."""
        from streamlens.analyses.ablation.drawing import draw_sweep

        return draw_sweep(self, ax)


def score_rows(scores: Scores) -> list[dict[str, Any]]:
    """Return the scores of each trial as a row, those that there are."""
    head = scores.headline
    columns: dict[str, Floats] = {}
    if head == "delta_loss":
        delta = scores.mean("delta_loss")
        with np.errstate(over="ignore"):
            columns |= {"delta_loss": delta, "perplexity_ratio": np.exp(delta)}
    for name in ("kl", "top1_agreement", "pooled_distance"):
        if name in scores.sums:
            columns[name] = scores.mean(name)
    for name in ("delta_loss", "kl", "top1_agreement"):
        if name in columns:
            columns[f"{name}_with_first"] = scores.mean(name, with_first=True)
    low, high = scores.intervals(head)
    rows: list[dict[str, Any]] = []
    for index in range(len(low)):
        row = {name: float(values[index]) for name, values in columns.items()}
        ends: dict[str, Any] = {"low": float(low[index]), "high": float(high[index]), "interval_over": scores.unit}
        rows.append({head: row.pop(head, float("nan")), **ends, **row})
    return rows


def _missing(label: str, drops: Sequence[Drop]) -> dict[str, Any]:
    raise KeyError(f"nothing called {label!r} was dropped; there are {', '.join(d.label for d in drops)}")


@resting
def ablate(
    origin: Origin,
    drop: Sequence[str | int] | str | int | None = None,
    mode: Mode = "skip",
    *,
    units: str = "both",
    per_position: bool = False,
    **options: Unpack[Options],
) -> AblationResult:
    """Leave layers or sublayers out and measure what the model loses (Veit et al. 1605.06431; Lad et al. 2406.19384).

    Each run begins at the stored state before what is dropped, so a sweep costs half of as many forward passes. The
    model is edited while it runs and left as it was.

    Args:
        origin: a capture (its model is loaded), a model, or a source.
        drop: what to drop, all of it together in one run: layers (``7``, ``"3-5"``), sublayers (``"7.attn"``, a label).
            Without it, each layer and each sublayer is dropped by itself.
        mode: ``skip`` (the state after is the state before, without addition and norm), ``zero`` (nothing is
            written), ``mean`` (the mean write over the text, without position 0) or ``resample`` (what was written in
            another window, of another document where the batch has several). Where skip and zero differ (a norm after
            the addition, a factor on the skip) both are reported. Of two parallel writes, one alone is set to zero.
        units: of a sweep: ``layers``, ``sublayers`` or ``both``.
        per_position: in mode mean: a mean for each position.
        **options: protect_first (leave position 0, the attention sink, as it is), draw_seed, stream, model, progress;
            for a live model also what it is shown, as in `streamlens.capture`. See `Options`.

    Returns:
        Increase of the loss, KL divergence, top-1 agreement and perplexity ratio; without logits, how far the pooled
        output turns. Intervals are over documents, or over windows where there are fewer than ten documents.

    Raises:
        UsageError: a layer or mode that does not exist.
        MissingDataError: the capture lacks a state that a run begins with, or its model is not there.

    Example:
        >>> import torch
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
        >>> encoder = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
        >>> _ = torch.nn.init.zeros_(encoder.layers[1].linear2.weight)
        >>> _ = torch.nn.init.zeros_(encoder.layers[1].linear2.bias)
        >>> found = ablate(encoder, inputs=torch.randn(4, 5, 8), progress=False)
        >>> found["1_mlp_out"]["pooled_distance"]
        0.0
    """
    check_units(units, "a sweep", "layers", "sublayers", "both")
    study = Study.of(origin, mode, per_position=per_position, **options)
    return _sweep(study, None if drop is None else chosen(study.source.stream, drop, mode), units)


def _sweep(study: Study, one: Drop | None, units: str) -> AblationResult:
    stream = study.source.stream
    drops = in_modes(stream, every(stream, units, study.mode) if one is None else [one], study.setting.parameters)
    proxies = Proxies(stream, drops)
    scores = study.measured([Dropped(d) for d in drops], "ablate", also=proxies.update)
    title = study.title("Layer drop", scores, tuple(dict.fromkeys(d.mode for d in drops)))
    return AblationResult(tuple(drops), scores, proxies.result(), title)
