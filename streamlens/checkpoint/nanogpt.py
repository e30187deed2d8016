"""The model of a nanoGPT checkpoint: GPT-2's shape, with nanoGPT's names for its modules."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from streamlens.checkpoint.weights import assign_state, strip_prefixes
from streamlens.errors import CheckpointError

_BLOCK = re.compile(r"(?:^|\.)h\.(\d+)\.")


@dataclass(frozen=True)
class NanoGPTConfig:
    """nanoGPT's `model_args`; its dropout is left out, because it does nothing in a model that is not trained."""

    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    bias: bool = True

    @classmethod
    def from_args(cls, args: Mapping[str, Any], where: str) -> NanoGPTConfig:
        """Check `model_args` and take them over.

        Raises:
            CheckpointError: an argument is missing, unknown (a fork of nanoGPT computes something else), or no size.

        >>> NanoGPTConfig.from_args(dict(block_size=8, vocab_size=9, n_layer=1, n_head=2, n_embd=4, dropout=0.1), "x")
        NanoGPTConfig(block_size=8, vocab_size=9, n_layer=1, n_head=2, n_embd=4, bias=True)
        """
        names = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(map(str, args)) - {*names, "dropout"})
        if unknown:
            raise CheckpointError(
                f"{where}: model_args {unknown} are not nanoGPT's, so this is another model: "
                "build it with --model package.module:factory"
            )
        given = {name: args[name] for name in names if name in args}
        sizes = [name for name in names if name != "bias"]
        wrong = [name for name in sizes if type(given.get(name)) is not int or given[name] < 1]
        if wrong or type(given.get("bias", True)) is not bool:
            raise CheckpointError(
                f"{where}: nanoGPT's config needs {', '.join(sizes)} as positive integers and bias as true or false; "
                f"got {given}"
            )
        if given["n_embd"] % given["n_head"]:
            raise CheckpointError(f"{where}: n_embd {given['n_embd']} does not divide into n_head {given['n_head']}")
        return cls(**given)

    @staticmethod
    def describes(config: Mapping[str, Any]) -> bool:
        """Whether a config is nanoGPT's and not Hugging Face's, whose GPT-2 uses some of the same words."""
        return {"n_layer", "n_head", "n_embd", "block_size"} <= set(config) and "model_type" not in config


class CausalSelfAttention(nn.Module):
    """Multi-head attention to this and earlier positions."""

    def __init__(self, config: NanoGPTConfig) -> None:
        """Make the two projections."""
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.n_head = config.n_head

    def forward(self, x: Tensor) -> Tensor:
        """(doc, position, d_model) to the same shape."""
        query, key, value = (
            part.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for part in self.c_attn(x).chunk(3, dim=-1)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return cast(Tensor, self.c_proj(mixed.transpose(1, 2).flatten(-2)))


class MLP(nn.Module):
    """Two linears with an exact GELU between them."""

    def __init__(self, config: NanoGPTConfig) -> None:
        """Make the two linears."""
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(doc, position, d_model) to the same shape."""
        return cast(Tensor, self.c_proj(functional.gelu(self.c_fc(x))))


class Block(nn.Module):
    """One pre-norm layer."""

    def __init__(self, config: NanoGPTConfig) -> None:
        """Make both sublayers and their norms."""
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        """(doc, position, d_model) to the same shape."""
        x = x + self.attn(self.ln_1(x))
        return cast(Tensor, x + self.mlp(self.ln_2(x)))


class NanoGPT(nn.Module):
    """Token ids to logits for every position, where nanoGPT itself gives them for the last position only.

    >>> config = NanoGPTConfig(block_size=8, vocab_size=9, n_layer=1, n_head=2, n_embd=4)
    >>> NanoGPT(config)(torch.zeros(2, 5, dtype=torch.int64)).shape
    torch.Size([2, 5, 9])
    """

    def __init__(self, config: NanoGPTConfig) -> None:
        """Make all tables, layers and the head, which shares the token table."""
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd, bias=config.bias),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = cast(nn.Parameter, self.transformer["wte"].weight)

    def forward(self, idx: Tensor) -> Tensor:
        """Token ids (doc, position) to logits (doc, position, vocab).

        Raises:
            ValueError: more positions than the model has.
        """
        positions = idx.shape[1]
        if positions > self.config.block_size:
            raise ValueError(f"{positions} positions given, but the model has {self.config.block_size}")
        x = self.transformer["wte"](idx) + self.transformer["wpe"](torch.arange(positions, device=idx.device))
        for block in cast(nn.ModuleList, self.transformer["h"]):
            x = block(x)
        return cast(Tensor, self.lm_head(self.transformer["ln_f"](x)))


def build_nanogpt(
    args: Mapping[str, Any], state: Mapping[str, Tensor], where: str, *, dtype: torch.dtype | None = None
) -> NanoGPT:
    """Make the model that `model_args` describe and give it its weights, in `dtype` or the dtypes they are stored in.

    Raises:
        CheckpointError: config and weights disagree.
    """
    config = NanoGPTConfig.from_args(args, where)
    layers = {match[1] for match in map(_BLOCK.search, state) if match}
    if len(layers) != config.n_layer:  # before anything is built: a config may claim any number
        raise CheckpointError(
            f"{where}: config and weights disagree: n_layer is {config.n_layer} in the config, "
            f"the weights have {len(layers)} layers"
        )
    with torch.device("meta"):  # shapes can be compared before any memory is taken
        model = NanoGPT(config)
    # nanoGPT without fused attention stores its causal mask, which is no weight.
    weights = {name: tensor for name, tensor in state.items() if not (name.endswith(".attn.bias") and tensor.ndim == 4)}
    assign_state(model, strip_prefixes(weights, model.state_dict()), where)
    return model if dtype is None else model.to(dtype)
