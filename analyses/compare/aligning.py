"""Which row of one stream stands beside which row of another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from streamlens.analyses.norms.measures import Contribution


@dataclass(frozen=True)
class Alignment:
    """Rows of two streams that are set side by side."""

    pairs: tuple[tuple[int, int], ...]
    """Indices into the rows of the first and of the second stream, in the order of the first."""
    says: str
    """How the rows were found, in words."""


def align(first: Sequence[Contribution], second: Sequence[Contribution], layers: tuple[int, int]) -> Alignment:
    """Return the rows that belong together.

    Rows of the same names are aligned by name. Otherwise a row of a layer stands beside the row of the same kind in
    the layer at the same relative depth; embedding parts and biases stand beside those of the same name. What has no
    counterpart is left out.

    Args:
        first: rows of one stream.
        second: rows of the other.
        layers: L and M, how many layers each has.

    >>> rows = [Contribution(f"{layer}_mlp_out", "mlp", layer) for layer in range(6)]
    >>> align(rows[:2], rows, (2, 6)).pairs
    ((0, 1), (1, 4))
    """
    if [(row.kind, row.label) for row in first] == [(row.kind, row.label) for row in second]:
        return Alignment(tuple((i, i) for i in range(len(first))), "aligned by name")
    depth, other_depth = layers
    theirs = _places(second)
    pairs: list[tuple[int, int]] = []
    for (kind, place), own in _places(first).items():
        at = beside(place, layers) if isinstance(place, int) else place
        pairs += zip(own, theirs.get((kind, at), ()), strict=False)
    how = "layer" if depth == other_depth else f"relative depth, {depth} layers with {other_depth}"
    left = len(first) - len(pairs), len(second) - len({j for _, j in pairs})
    return Alignment(tuple(sorted(pairs)), f"aligned by {how}; without a counterpart: {left[0]} and {left[1]} rows")


def beside(layer: int, layers: tuple[int, int]) -> int:
    """Return the layer out of M that stands at the same relative depth as a layer out of L: floor((l + 1/2) M / L).

    >>> [beside(layer, (3, 6)) for layer in range(3)]
    [1, 3, 5]
    """
    return int((layer + 0.5) * layers[1] / layers[0])


def _places(rows: Sequence[Contribution]) -> dict[tuple[str, str | int], list[int]]:
    """Rows by their kind and their layer, or their name where they belong to none."""
    found: dict[tuple[str, str | int], list[int]] = {}
    for index, row in enumerate(rows):
        found.setdefault((row.kind, row.label if row.layer is None else row.layer), []).append(index)
    return found
