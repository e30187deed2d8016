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


def control_subspace(deviations: Tensor, basis: Tensor, generator: torch.Generator) -> tuple[Tensor, float]:
    """Return a random subspace, orthogonal to another, that holds the same energy, (d_model, k) orthonormal.

    A subspace drawn at random usually holds less energy than one that was chosen; so it is turned towards the
    strongest (or weakest) directions of what is left, as far as is needed.

    Args:
        deviations: (sample, d_model) from the mean.
        basis: (d_model, k) orthonormal, k at most d_model / 2.
        generator: of the draw; on the CPU.

    Returns:
        The subspace, and the factor by which its part has to be multiplied to hold exactly as much energy: 1 unless
        no subspace of k dimensions holds enough.

    >>> data = torch.randn(500, 6, dtype=torch.float64) * torch.tensor([3.0, 2.0, 2.0, 2.0, 1.0, 1.0])
    >>> chosen = torch.eye(6, dtype=torch.float64)[:, 1:2]
    >>> other, factor = control_subspace(data, chosen, torch.Generator().manual_seed(0))
    >>> bool(((data @ other).square().sum() / (data @ chosen).square().sum() - 1).abs() < 1e-6), factor
    (True, 1.0)
    """
    k = basis.shape[1]
    drawn = torch.randn(basis.shape, generator=generator, dtype=torch.float64).to(basis.device)
    start = torch.linalg.qr(drawn - basis @ (basis.mT @ drawn)).Q
    left = deviations - (deviations @ basis) @ basis.mT
    _, directions = torch.linalg.eigh(left.mT @ left)
    wanted = float((deviations @ basis).square().sum())
    # The k weakest directions of what is left are the subspace itself, which holds nothing any more.
    end = directions[:, -k:] if _energy(left, start) < wanted else directions[:, k : 2 * k]

    def turned(share: float) -> Tensor:
        q: Tensor = torch.linalg.qr((1 - share) * start + share * end).Q
        return q

    low, high = 0.0, 1.0
    rising = _energy(left, end) > _energy(left, start)
    for _ in range(60):
        middle = (low + high) / 2
        enough = _energy(left, turned(middle)) >= wanted
        low, high = (low, middle) if enough == rising else (middle, high)
    found = turned(high)
    held = _energy(left, found)
    factor = (wanted / held) ** 0.5 if held > 0 else 0.0
    return found, 1.0 if abs(factor - 1) < 1e-6 else factor


def _energy(deviations: Tensor, basis: Tensor) -> float:
    return float((deviations @ basis).square().sum())


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
