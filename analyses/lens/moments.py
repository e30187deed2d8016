"""Sums over tokens from which the closed forms of the tuned lens follow."""

from __future__ import annotations

import torch
from torch import Tensor

from streamlens.block import Block


class StateMoments:
    """First and, if wanted, second moments of each state x and of what it lacks, x_K - x; float64.

    Args:
        states: how many states, without the last.
        width: d_model.
        second: whether to keep the second moments, two matrices for each state.
    """

    def __init__(self, states: int, width: int, *, second: bool) -> None:
        self.count = 0
        self._sum = torch.zeros(states, width, dtype=torch.float64)
        self._lack = torch.zeros(states, width, dtype=torch.float64)
        shape = (states, width, width) if second else (0,)
        self._square = torch.zeros(shape, dtype=torch.float64)
        self._cross = torch.zeros(shape, dtype=torch.float64)

    def update(self, block: Block) -> None:
        """Fold a block in."""
        last = block.states[len(self._sum)].cpu().double()
        self.count += len(last)
        for k in range(len(self._sum)):
            state = block.states[k].cpu().double()
            lack = last - state
            self._sum[k] += state.sum(0)
            self._lack[k] += lack.sum(0)
            if self._square.numel():
                self._square[k].addmm_(state.t(), state)
                self._cross[k].addmm_(state.t(), lack)

    def merge(self, other: StateMoments) -> None:
        """Fold another partial result in."""
        self.count += other.count
        for name in ("_sum", "_lack", "_square", "_cross"):
            getattr(self, name).add_(getattr(other, name))

    def bias(self) -> Tensor:
        """Return b = E[x_K - x], (state, d_model) float32."""
        return (self._lack / self.count).float()

    def ridge(self, penalty: float) -> tuple[Tensor, Tensor]:
        """Return W (state, d_model, d_model) and b (state, d_model), float32, that carry x to x_K with least squares.

        Args:
            penalty: on the squares of W, in units of the median variance of a dimension.
        """
        matrices, biases = [], []
        for k in range(len(self._sum)):
            mean, lack = self._sum[k] / self.count, self._lack[k] / self.count
            covariance = self._square[k] / self.count - torch.outer(mean, mean)
            cross = self._cross[k] / self.count - torch.outer(mean, lack)
            variance = covariance.diagonal()
            # The median, because a few massive dimensions would drive the mean; never quite nothing, because a
            # dimension that does not vary would leave the system without a solution.
            strength = penalty * variance.median() + 1e-10 * variance.max().clamp_min(1e-30)
            solved = torch.linalg.solve(covariance + strength * torch.eye(len(mean), dtype=torch.float64), cross)
            matrices.append(solved.t().float())
            biases.append((lack - mean @ solved).float())
        return torch.stack(matrices), torch.stack(biases)
