"""Small models whose sums have factors of every kind: on the skip, on a branch, on the whole sum, on the embedding."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from fixtures.recipe import D_MODEL, VOCAB
from fixtures.zoo_styles import Layer, Model

IDS = torch.arange(33).reshape(3, 11) * 7 % VOCAB
"""(doc, position)"""


class _Scaled(Layer):
    """What the layers below have in common: a learned number and a learned vector."""

    def __init__(self) -> None:
        super().__init__()
        self.number = nn.Parameter(torch.tensor(1.3))
        self.vector = nn.Parameter(1.0 + 0.3 * torch.randn(D_MODEL))


class Halved(_Scaled):
    """(x + f(x)) / sqrt(2), the sum whole."""

    def forward(self, x: Tensor) -> Tensor:
        """States (doc, position, d_model) to the next states."""
        x = (x + self.attn(self.ln1(x))) / 2**0.5
        return cast(Tensor, (x + self.mlp(self.ln2(x))) / 2**0.5)


class Vector(_Scaled):
    """(x + f(x)) times a learned vector."""

    def forward(self, x: Tensor) -> Tensor:
        """States (doc, position, d_model) to the next states."""
        x = (x + self.attn(self.ln1(x))) * self.vector
        return cast(Tensor, (x + self.mlp(self.ln2(x))) * self.vector)


class Divided(_Scaled):
    """x / p + f(x), and a gate for each dimension on the skip."""

    def forward(self, x: Tensor) -> Tensor:
        """States (doc, position, d_model) to the next states."""
        x = x / self.number + self.attn(self.ln1(x))
        return cast(Tensor, x * torch.sigmoid(self.vector) + self.mlp(self.ln2(x)))


class HalvedPostNorm(_Scaled):
    """A norm behind a sum that is scaled."""

    def forward(self, x: Tensor) -> Tensor:
        """States (doc, position, d_model) to the next states."""
        x = self.ln1((x + self.attn(x)) * 0.5)
        return cast(Tensor, self.ln2((x + self.mlp(x)) * self.vector))


class _ScaledEmbedding(Model):
    """(tokens + positions) times a number."""

    def embed(self, idx: Tensor) -> Tensor:
        """Ids (doc, position) to the first states (doc, position, d_model)."""
        return super().embed(idx) * 3.0


MODELS: dict[str, Callable[[], nn.Module]] = {
    "halved": lambda: Model(Halved),
    "vector": lambda: Model(Vector),
    "divided": lambda: Model(Divided),
    "halved_post_norm": lambda: Model(HalvedPostNorm),
    "scaled_embedding": lambda: _ScaledEmbedding(Halved),
}


def build(name: str) -> nn.Module:
    """Build one, with random weights that are always the same."""
    torch.manual_seed(3)
    module = MODELS[name]().eval()
    for norm in (m for m in module.modules() if isinstance(m, nn.LayerNorm)):
        nn.init.normal_(norm.weight, 1.0, 0.3)
        nn.init.normal_(norm.bias, 0.0, 0.3)
    return module
