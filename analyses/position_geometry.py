"""How alike the positional parts of two states are: subspaces, kernels, ranks. All of them ignore rotations."""

from __future__ import annotations

import torch
from torch import Tensor


def top_span(table: Tensor, k: int) -> Tensor:
    """Return (d_model, k) an orthonormal basis of the k strongest directions of (position, d_model); fewer if less.

    >>> top_span(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), 1).abs()
    tensor([[1.],
            [0.]])
    """
    _, strength, directions = torch.linalg.svd(table, full_matrices=False)
    rank = int((strength > strength[:1] * 1e-6).sum()) if len(strength) and strength[0] > 0 else 0
    basis: Tensor = directions[: min(k, rank)].mT
    return basis


def subspace_overlap(first: Tensor, second: Tensor) -> float:
    """Return the mean squared cosine of the principal angles between two spans, (d_model, k) orthonormal each.

    1 for the same span, 0 for orthogonal ones, and k / d_model on average for random ones; NaN where one is empty.

    >>> subspace_overlap(torch.eye(4)[:, :2], torch.eye(4)[:, 1:3])
    0.5
    """
    k = min(first.shape[1], second.shape[1])
    return float((first.mT @ second).square().sum()) / k if k else float("nan")


def debiased_cka(first: Tensor, second: Tensor) -> float:
    """Return linear CKA between (sample, width) tables, without the bias that few samples bring.

    The Hilbert-Schmidt independence criterion as a U-statistic (Song et al. 2012; Nguyen et al. 2021): 1 for tables
    equal up to rotation, shift and scale, around 0 for unrelated ones, and it may be slightly negative. NaN below four
    samples, or where a table does not vary.

    >>> table = torch.randn(9, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> round(debiased_cka(table, -2 * table.flip(1) + 1), 9)
    1.0
    """
    if len(first) < 4:
        return float("nan")
    one, two = _u_centred(first), _u_centred(second)
    scale = (one * one).sum() * (two * two).sum()
    return float((one * two).sum() / scale.sqrt()) if scale > 0 else float("nan")


def stable_rank(table: Tensor) -> float:
    """Return the sum of the squared singular values over the largest: how many directions matter.

    >>> stable_rank(torch.diag(torch.tensor([2.0, 1.0])))
    1.25
    """
    strength = torch.linalg.svdvals(table).square()
    return float(strength.sum() / strength[0]) if strength[0] > 0 else float("nan")


def _u_centred(table: Tensor) -> Tensor:
    """(sample, sample) the Gram matrix without its diagonal, centred so that inner products of two are unbiased."""
    wide = table.double()
    wide = wide - wide.mean(0)  # changes nothing in the outcome, and keeps digits
    gram = wide @ wide.mT
    gram.fill_diagonal_(0.0)
    n = len(gram)
    rows = gram.sum(1) / (n - 2)
    centred = gram - rows[:, None] - rows + rows.sum() / (n - 1)
    return centred.fill_diagonal_(0.0)
