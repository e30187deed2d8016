"""What is measured of each contribution at each token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MEASURES = (
    "relative_write", "cosine", "growth", "block_influence", "proximity", "projection_share", "logit_attribution",
    "write_norm", "read_norm", "final_frame_norm",
)  # fmt: skip
"""With x the state that a branch read, w what it wrote and y = c x + e w their sum (in nearly all models c = e = 1):

relative_write     |w| / |x|
cosine             of w and x; below 0 the write erases, near 0 it points in a new direction, above 0 it amplifies
growth             |y|^2 / |x|^2
block_influence    1 - cos(x, y) (Men et al. 2024)
proximity          share of w in the sum y of its step by L1 distance, max(|y| - |y - w|, 0) over that of all terms
                   (Ferrando et al. 2022; Ferrando and Voita 2024)
projection_share   <T w, x_K> / |x_K|^2, T being all norms that the stream passes afterwards, their statistics fixed;
                   over embedding parts, writes and biases of norms it sums to 1. Where the head begins with a norm
                   that subtracts the mean, means are subtracted here too: no reader sees them
logit_attribution  what w adds to the logit of the target against the vocabulary's mean logit, final norm frozen
write_norm         |w|        read_norm    |x|
final_frame_norm   |T w|, the size of what the write has become in the last state: |w| itself where T is the identity
"""

SUBLAYER_KINDS = ("attn", "cross_attn", "mixer", "mlp")
OVERLAPPING = ("layer", "head")
"""Kinds of rows that are sums or parts of other rows: left out where rows add up."""


@dataclass(frozen=True)
class Contribution:
    """One row of the result."""

    label: str
    kind: str
    """embed, attn, cross_attn, mixer, mlp; norm, for the bias of one; head, for one head of an attention; layer, for
    all writes of a layer together, as they stand at its end."""
    layer: int | None


def pair(read: Tensor, write: Tensor, product: Tensor, after: tuple[Tensor, Tensor] | None = None) -> dict[str, Tensor]:
    """Return what follows from |x|^2, |w|^2 and <x, w>, each (token,); exact identities, in float64.

    What is relative to x is NaN where x is zero.

    Args:
        read: |x|^2.
        write: |w|^2.
        product: <x, w>.
        after: |y|^2 and <x, y>, where the sum is another than y = x + w because its terms have factors.

    >>> x, w = torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 3.0]])
    >>> found = pair((x * x).sum(-1), (w * w).sum(-1), (x * w).sum(-1))
    >>> [round(float(found[k]), 4) for k in ("relative_write", "cosine", "growth", "block_influence")]
    [1.0, 0.96, 3.92, 0.0101]
    """
    xx, ww, xw = read.double().clamp_min(1e-30), write.double(), product.double()
    yy, xy = (xx + 2 * xw + ww, xx + xw) if after is None else (after[0].double(), after[1].double())
    summed = yy.clamp_min(0)
    cosine = xw / (xx * ww).sqrt().clamp_min(1e-30)
    kept = xy / (xx * summed).sqrt().clamp_min(1e-30)
    relative = {
        "relative_write": (ww / xx).sqrt(),
        "cosine": cosine.clamp(-1, 1),
        "growth": summed / xx,
        "block_influence": 1 - kept.clamp(-1, 1),
    }
    # Beside a state of zeros, that of a padding token say, nothing has a size or a direction.
    found = {name: torch.where(read > 0, values, torch.nan) for name, values in relative.items()}
    return found | {"write_norm": ww.sqrt(), "read_norm": read.double().sqrt()}


def proximities(whole: Tensor, without: Sequence[Tensor]) -> list[Tensor]:
    """Return the share of each term in a sum by L1 distance.

    Args:
        whole: (token,) |y|_1 of the sum.
        without: for each term p, (token,) |y - p|_1.

    Returns:
        For each term, (token,) max(|y|_1 - |y - p|_1, 0) over the total of these; equal shares where all are 0.

    >>> [float(s) for s in proximities(torch.tensor([3.0]), [torch.tensor([1.0]), torch.tensor([2.0])])]
    [0.6666666666666666, 0.3333333333333333]
    """
    near = [(whole.double() - rest.double()).clamp_min(0) for rest in without]
    total = torch.stack(near).sum(0)
    return [torch.where(total > 0, n / total.clamp_min(1e-30), 1 / len(near)) for n in near]
