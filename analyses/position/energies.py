"""What the sums over documents say: the energies of a state, what they would be by chance, and how sure they are."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch
from scipy.special import stdtrit
from torch import Tensor

from streamlens.analyses.position.geometry import top_span
from streamlens.analyses.position.sums import PositionSums, sketch_of
from streamlens.analyses.statistics import Floats
from streamlens.errors import MissingDataError
from streamlens.wording import counted


@dataclass(frozen=True)
class Split:
    """How the energy of one state splits; the four add up to the sum of its squares."""

    mean: float
    position: float
    context: float
    rest: float
    docs: int
    positions: int
    parts: Tensor
    """(position, d_model) float64 the positional part of the state."""

    @property
    def total(self) -> float:
        """What is split without the mean."""
        return self.position + self.context + self.rest

    @property
    def raw_share(self) -> float:
        """Share of the positional part, as it is."""
        return self.position / self.total if self.total else float("nan")

    @property
    def energy(self) -> float:
        """Squared norm of the positional part, summed over positions, without what averaging over documents adds.

        The average of <a, b> over all pairs of documents, a and b what is left of each without its mean.
        """
        return (self.position - self.rest / (self.docs - 1)) / self.docs

    @property
    def share(self) -> float:
        """Share of the positional part without what the average over finitely many documents adds to it."""
        return self.docs * self.energy / self.total if self.total else float("nan")

    @property
    def f_ratio(self) -> float:
        """Mean square between positions over mean square of the rest."""
        return self.position * (self.docs - 1) / self.rest if self.rest > 0 else float("nan")


def split(sums: PositionSums, state: int, first: int | None = None) -> Split:
    """Return the energies of a state (two-way analysis of variance).

    Args:
        sums: what was added up.
        state: which state.
        first: the first position that counts; by default that of the sums.

    Raises:
        MissingDataError: fewer than two documents or positions.
    """
    start = sums.first if first is None else first
    docs, count = sums.docs, sums.positions - start
    if docs < 2 or count < 2:
        first_left_out = ", position 0 left out" if start else ""
        raise MissingDataError(
            f"the positional part compares at least 2 positions over at least 2 documents, and here are "
            f"{counted(docs, 'document')} with {counted(max(count, 0), 'position')} that count{first_left_out}: use "
            "more text, or ask for more positions, which leaves out the documents that are shorter"
        )
    table = sums.sums[state][start:] / docs
    mean = table.mean(0)
    parts = table - mean
    energy = docs * count * float(mean.square().sum())
    position = docs * float(parts.square().sum())
    context = float(sums.doc_squares[state][0 if start == sums.first else 1]) / count - energy
    rest = float(sums.squares[state][start:].sum()) - energy - position - context
    return Split(energy, position, max(context, 0.0), max(rest, 0.0), docs, count, parts)


def null_band(sums: PositionSums, state: int, own: Split, share: float = 0.95) -> tuple[float, float]:
    """Return the central interval of `Split.share` if each document's positions stood in random order.

    Under random permutations within each document, the mean and the variance of the positional energy follow exactly
    from the scatter matrices of the documents (the permuted sums of Hoeffding 1951). The quantiles are those of the
    gamma distribution with these two moments, by the cube-root approximation of Wilson and Hilferty (1931). In a
    stream wider than `WHOLE_WIDTH` the variance comes from a sketch, which may change the width of the band by a tenth.
    """
    within = own.position + own.rest
    mean = within / own.docs
    pairs = float(sums.scatter[state].square().sum() - sums.own_scatter[state])
    variance = max(2 * pairs / (own.docs**2 * (own.positions - 1)), 0.0)
    if not variance or not own.total:
        return 0.0, 0.0
    spread = variance / (9 * mean**2)
    bounds = []
    for tail in ((1 - share) / 2, (1 + share) / 2):
        energy = mean * max(1 - spread + NormalDist().inv_cdf(tail) * spread**0.5, 0.0) ** 3
        bounds.append((own.docs * energy - within) / ((own.docs - 1) * own.total))
    return bounds[0], bounds[1]


def relative_norm(sums: PositionSums, state: int, own: Split) -> float:
    """Return ||P||_2 / ||M||_2 of Song & Zhong (2023): P the positional part, M all but the rest, spectral norms.

    M has a row for each document and position; its Gram matrix is docs * P^T P plus positions * (the sum of the outer
    products of the documents' means), the latter from a sketch (Nystroem) in a wide stream.
    """
    product = sums.doc_products[state]
    sketch = sketch_of(product.shape[0], product.device)
    core, basis = torch.linalg.eigh(sketch.T @ product)
    kept = core > core[-1] * 1e-12
    root = (product @ basis[:, kept]) * core[kept].rsqrt()
    position = own.parts * own.docs**0.5
    both = torch.cat([position, root.T * own.positions**0.5])
    return float(torch.linalg.matrix_norm(position, 2) / torch.linalg.matrix_norm(both, 2))


@dataclass(frozen=True)
class Estimates:
    """Numbers with the ends of their 95 % intervals, all of one shape."""

    value: Floats
    low: Floats
    high: Floats


def without_each_fold(sums: PositionSums, state: int) -> tuple[Floats, Floats]:
    """Return the share and the energy of the positional part with one group of documents left out at a time.

    In a stream wider than `WHOLE_WIDTH` they come from a sketch: good for how far they are from each other.

    Returns:
        (fold,) `Split.share` and `Split.energy` of the other documents, for each group that has any; NaN where fewer
        than two documents are left.
    """
    some = sums.fold_docs > 0
    docs = (sums.docs - sums.fold_docs)[some]
    positions = sums.positions - sums.first

    def left(table: Tensor) -> Tensor:
        return (table.sum(0) - table[some.to(table.device)]).cpu()

    squares = left(sums.fold_squares[state])
    energy = (left(sums.fold_parts[state]).square().sum((1, 2)) - squares[:, 0]) / (docs * (docs - 1))
    means = left(sums.fold_means[state]).square().sum(1) / docs
    total = squares[:, 1] + positions * (squares[:, 2] - means)
    energy = torch.where(docs > 1, energy, torch.nan)
    return (docs * energy / total).numpy(), energy.numpy()


def jackknife(value: float, without: Floats, sums: PositionSums) -> tuple[float, float]:
    """Return the ends of the 95 % interval of a number, from what it is without each group of documents.

    The jackknife with groups left out (Quenouille 1956; Tukey 1958), and Student's t for as many as there are.

    Args:
        value: the number.
        without: (fold,) the same from all documents but those of a group.
        sums: whose groups.
    """
    docs = sums.fold_docs[sums.fold_docs > 0].numpy()
    if len(docs) < 2 or not np.isfinite(without).all():
        return float("nan"), float("nan")
    variance = ((docs.sum() - docs) / docs.sum() * (without - without.mean()) ** 2).sum()
    half = float(stdtrit(len(docs) - 1, 0.975) * variance**0.5)
    return value - half, value + half


def origin_shares(sums: PositionSums, state: int) -> Floats:
    """Return (term,) what share of the positional part of a state each of its terms is; NaN for those to come.

    By inner products of a term, averaged over one half of the documents, with the state, averaged over the other:
    what averaging over finitely many documents leaves of everything else is independent in the two, so it does not
    add up to anything, as it would in the inner product of two averages over the same documents.
    """
    found = np.full(len(sums.term_names), np.nan)
    own = halves(sums, sums.sums[state], sums.halves[state])
    energy = float((own[0] * own[1]).sum())
    for term in range(len(found)):
        tables = sums.term(state, term)
        if tables is not None and energy > 0:
            first, second = halves(sums, *tables)
            found[term] = float((first * own[1] + second * own[0]).sum()) / 2 / energy
    return found


def positional_span(sums: PositionSums, state: int, share: float, most: int) -> Tensor:
    """Return (d_model, k) an orthonormal basis that holds this share of the positional energy; empty if there is none.

    The strongest directions of P_1^T P_2, symmetrised, with P_1 and P_2 the positional parts of two halves of the
    documents: what averaging leaves of everything else adds to none of them on average, and is not chosen for being
    large, as it would be in the directions of one positional part.

    Args:
        sums: what was added up.
        state: which state.
        share: of the energy, below 1.
        most: dimensions, at most.
    """
    first, second = halves(sums, sums.sums[state], sums.halves[state])
    both = torch.cat([first, second])
    if not bool(both.isfinite().all()):
        return both.new_zeros(both.shape[1], 0)
    basis = top_span(both, len(both))
    product = (first @ basis).T @ (second @ basis)
    strength, directions = torch.linalg.eigh((product + product.T) / 2)
    total = float(strength.sum())
    if not total > 0:
        return basis[:, :0]
    needed = int((strength.flip(0).cumsum(0) < share * total).sum()) + 1
    found: Tensor = basis @ directions.flip(1)[:, : min(needed, most)]
    return found


def halves(sums: PositionSums, whole: Tensor, even: Tensor) -> tuple[Tensor, Tensor]:
    """Return the positional parts, each (position, d_model), of two halves of the documents; NaN where one is empty.

    Args:
        sums: whose documents.
        whole: (position, d_model) sum over all of them.
        even: (position, d_model) sum over those of the even folds.
    """
    docs = (float(sums.fold_docs[::2].sum()), float(sums.fold_docs[1::2].sum()))
    parts = zip((even, whole - even), docs, strict=True)
    first, second = (positional(part, n, sums.first) if n else torch.full_like(part, torch.nan) for part, n in parts)
    return first, second


def positional(table: Tensor, docs: float, first: int) -> Tensor:
    """Return (position, d_model) the positional part of what a table (position, d_model) sums over documents."""
    means = table[first:] / docs
    return means - means.mean(0)
