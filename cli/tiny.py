"""A model to try the commands on where none is at hand: `--model streamlens.cli.tiny:model`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from streamlens.checkpoint.nanogpt import NanoGPT


def model() -> NanoGPT:
    """Build a GPT of two layers with random weights, over bytes; its numbers mean nothing.

    >>> sum(p.numel() for p in model().parameters())
    35712
    """
    from streamlens.checkpoint.nanogpt import NanoGPT, NanoGPTConfig

    return NanoGPT(NanoGPTConfig(block_size=64, vocab_size=256, n_layer=2, n_head=4, n_embd=32))
