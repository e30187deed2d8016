"""One layer after the other: in the order that costs least, in that of a proxy, and at random."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

from streamlens.analyses.ablation.proxies import Proxies
from streamlens.analyses.ablation.runs import Dropped
from streamlens.analyses.ablation.scores import Scores
from streamlens.analyses.ablation.spans import Drop, Mode, every, together
from streamlens.analyses.ablation.study import Options, Study, in_mode
from streamlens.analyses.ablation.sweep import score_rows
from streamlens.analyses.ablation.trials import explained
from streamlens.analyses.result import Result
from streamlens.analyses.source import Origin, watched
from streamlens.errors import UsageError
from streamlens.rest import resting

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GREEDY, INFLUENCE, RANDOM = "greedy", "block influence", "random"


@dataclass(frozen=True)
class GreedyResult(Result):
    """What the model loses as more and more layers are left out."""

    orders: Mapping[str, tuple[int, ...]]
    """The layers in the order in which each way of choosing leaves them out: greedy, block influence, random 1, ..."""
    scores: Mapping[str, Scores]
    """For each order the scores of its first 1, 2, ... layers, (trial,)."""
    mode: Mode
    title: str = ""
    other: GreedyResult | None = None
    """The same in the other mode, where skip and zero differ: its greedy order may be another one."""

    def rows(self) -> list[dict[str, Any]]:
        """Return one row for each mode, order and number of layers."""
        table = []
        for name, order in self.orders.items():
            for count, row in enumerate(score_rows(self.scores[name]), 1):
                table.append({"order": name, "dropped": count, "layer": order[count - 1], "mode": self.mode, **row})
        return table + (self.other.rows() if self.other else [])

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the score by the number of layers left out, one line for each order."""
        from streamlens.analyses.ablation.drawing import draw_greedy

        return draw_greedy(self, ax)


@resting
def drop_greedily(
    origin: Origin,
    count: int | None = None,
    mode: Mode = "skip",
    *,
    random_orders: int = 3,
    **options: Unpack[Options],
) -> GreedyResult:
    """Leave out one layer after the other, each time the one without which least is lost.

    Beside it: the layers in the order of their Block Influence (ShortGPT, Men et al. 2403.03853), least first, and in
    random orders. The choice is made on the same text on which it is scored, so the greedy curve is a lower bound.

    Args:
        origin: a capture, a model, or a source.
        count: how many layers to leave out; by default half of them.
        mode: as in `ablate`.
        random_orders: how many random orders to draw.
        **options: protect_first (leave position 0, the attention sink, as it is), draw_seed, stream, model, progress;
            for a live model also what it is shown, as in `streamlens.capture`. See `Options`.

    Raises:
        UsageError: more layers than there are.
        MissingDataError: the capture lacks what a run begins with.

    Example:
        >>> import torch
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
        >>> encoder = torch.nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
        >>> found = drop_greedily(encoder, 2, inputs=torch.randn(4, 5, 8), progress=False)
        >>> len(found.orders["greedy"]), len(found.orders)
        (2, 5)
    """
    study = Study.of(origin, mode, **options)
    layers = every(study.source.stream, "layers", mode)
    total = len(layers)
    wanted = max(1, total // 2) if count is None else count
    if not 1 <= wanted <= total:
        raise UsageError(f"stream {study.source.stream.name!r} has {total} layers: drop 1 to {total}, not {wanted}")
    influence, rng = _by_influence(study, layers), np.random.default_rng(options.get("draw_seed", 0))
    orders = {INFLUENCE: influence[:wanted]}
    orders |= {f"{RANDOM} {k + 1}": tuple(map(int, rng.permutation(total)[:wanted])) for k in range(random_orders)}
    modes, found = study.modes(layers), None
    for each in reversed(modes):
        found = _in_one_mode(study, in_mode(layers, each), orders, wanted, modes, found)
    assert found is not None, "there is always the mode that was asked for"
    return found


def _in_one_mode(
    study: Study,
    layers: Sequence[Drop],
    others: Mapping[str, tuple[int, ...]],
    wanted: int,
    modes: Sequence[Mode],
    other: GreedyResult | None,
) -> GreedyResult:
    def run(sets: Sequence[Sequence[int]], label: str) -> Scores:
        return study.measured([Dropped(together([layers[layer] for layer in chosen])) for chosen in sets], label)

    gone: list[int] = []
    for number in range(wanted):
        left = [layer for layer in range(len(layers)) if layer not in gone]
        scores = run([[*gone, layer] for layer in left], f"greedy {number + 1} of {wanted}")
        gone.append(left[int(np.nanargmin(scores.mean(scores.headline)))])
    orders = {GREEDY: tuple(gone), **others}
    joined = run([order[: k + 1] for order in orders.values() for k in range(wanted)], "orders")
    split = {name: joined.taken(range(index * wanted, (index + 1) * wanted)) for index, name in enumerate(orders)}
    title = study.title("Layers left out one after the other", joined, modes)
    return GreedyResult(orders, split, layers[0].mode, title, other)


def _by_influence(study: Study, layers: Sequence[Drop]) -> tuple[int, ...]:
    """Return all layers, those of the least Block Influence first."""
    proxies = Proxies(study.source.stream, layers)
    with explained():
        for block in watched(study.source, "block influence", progress=study.progress):
            proxies.update(block)
    return tuple(int(i) for i in np.argsort(proxies.result()["block_influence"], kind="stable"))
