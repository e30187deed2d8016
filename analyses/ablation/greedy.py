"""One layer after the other: in the order that costs least, in that of a proxy, and at random."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

from streamlens.analyses.ablation.proxies import Proxies
from streamlens.analyses.ablation.runs import Dropped
from streamlens.analyses.ablation.scores import Scores
from streamlens.analyses.ablation.spans import Mode, every, together
from streamlens.analyses.ablation.sweep import check_mode, score_rows, setting_for
from streamlens.analyses.ablation.trials import explained, measured
from streamlens.analyses.result import Result
from streamlens.analyses.source import Corpus, Origin, source_of, watched
from streamlens.checkpoint.model import Model
from streamlens.errors import UsageError

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

    def rows(self) -> list[dict[str, Any]]:
        """Return one row for each order and number of layers."""
        table = []
        for name, order in self.orders.items():
            for count, row in enumerate(score_rows(self.scores[name]), 1):
                table.append({"order": name, "dropped": count, "layer": order[count - 1], "mode": self.mode, **row})
        return table

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the score by the number of layers left out, one line for each order."""
        from streamlens.analyses.ablation.drawing import draw_greedy

        return draw_greedy(self, ax)


def drop_greedily(
    origin: Origin,
    count: int | None = None,
    mode: Mode = "skip",
    *,
    random_orders: int = 3,
    protect_first: bool = False,
    draw_seed: int = 0,
    stream: str | None = None,
    model: Model | None = None,
    progress: bool = True,
    **corpus: Unpack[Corpus],
) -> GreedyResult:
    """Leave out one layer after the other, each time the one without which least is lost.

    Beside it: the layers in the order of their Block Influence (ShortGPT, Men et al. 2403.03853), least first, and in
    random orders. The choice is made on the same text on which it is scored, so the greedy curve is a lower bound.

    Args:
        origin: a capture, a model, or a source.
        count: how many layers to leave out; by default half of them.
        mode: as in `ablate`.
        random_orders: how many random orders to draw.
        protect_first: leave position 0 as it is.
        draw_seed: of the random orders, and of the pairing of documents in mode resample.
        stream: which stream; by default the one that the head reads.
        model: for a capture: its model, where it is loaded already.
        progress: show a progress bar.
        **corpus: for a live model: what it is shown, as in `streamlens.capture`.

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
    source = source_of(origin, stream=stream, model=model, **corpus)
    check_mode(mode)
    layers = every(source.stream, "layers", mode)
    wanted = max(1, len(layers) // 2) if count is None else count
    if not 1 <= wanted <= len(layers):
        raise UsageError(
            f"stream {source.stream.name!r} has {len(layers)} layers: drop 1 to {len(layers)}, not {wanted}"
        )
    setting = setting_for(source, mode, protect_first=protect_first, seed=draw_seed, progress=progress)

    def run(sets: Sequence[Sequence[int]], label: str) -> Scores:
        trials = [Dropped(together([layers[layer] for layer in chosen])) for chosen in sets]
        return measured(source, setting, trials, label, progress=progress)

    gone: list[int] = []
    for number in range(wanted):
        left = [layer for layer in range(len(layers)) if layer not in gone]
        scores = run([[*gone, layer] for layer in left], f"greedy {number + 1} of {wanted}")
        gone.append(left[int(np.nanargmin(scores.mean(scores.headline)))])
    proxies = Proxies(source.stream, layers)
    with explained():
        for block in watched(source, "block influence", progress=progress):
            proxies.update(block)
    influence = np.argsort(proxies.result()["block_influence"], kind="stable")
    rng = np.random.default_rng(draw_seed)
    orders = {GREEDY: tuple(gone), INFLUENCE: tuple(int(i) for i in influence[:wanted])}
    orders |= {
        f"{RANDOM} {number + 1}": tuple(int(i) for i in rng.permutation(len(layers))[:wanted])
        for number in range(random_orders)
    }
    every_set = [order[: k + 1] for order in orders.values() for k in range(wanted)]
    joined = run(every_set, "orders")
    split = {name: joined.taken(range(index * wanted, (index + 1) * wanted)) for index, name in enumerate(orders)}
    return GreedyResult(orders, split, mode, f"Layers left out one after the other ({mode}): {source.description}")
