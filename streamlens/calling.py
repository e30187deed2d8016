"""How a model is called: which arguments its forward takes, and which of its outputs is the main one."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from streamlens.errors import AnatomyError, UsageError

Inputs = Tensor | Mapping[str, Any]
"""What a forward is called with: one positional tensor, or a mapping of its arguments."""

_TOKENS = ("input_ids", "decoder_input_ids")
_OUTPUTS = ("logits", "last_hidden_state")


def token_inputs(module: nn.Module, ids: Tensor) -> Inputs:
    """Build the arguments of `module.forward` for a batch of token ids.

    Args:
        module: the model.
        ids: (doc, position) int64.

    Returns:
        A mapping where forward names its token arguments as Hugging Face models do, else the tensor itself. An
        encoder-decoder reads the same tokens on both sides.
    """
    names = inspect.signature(module.forward).parameters
    inputs: dict[str, Any] = {name: ids for name in _TOKENS if name in names}
    if "input_ids" not in inputs:
        return ids
    if "use_cache" in names:
        inputs["use_cache"] = False
    return inputs


def without_cache(module: nn.Module, inputs: Inputs) -> Inputs:
    """Ask for no key-value cache where forward knows one: it would be an output that bypasses the stream."""
    if not isinstance(inputs, Mapping) or "use_cache" in inputs:
        return inputs
    knows = "use_cache" in inspect.signature(module.forward).parameters
    return {**inputs, "use_cache": False} if knows else inputs


def check_inputs(inputs: Any) -> Inputs:
    """Return `inputs` if a forward can be called with them.

    Raises:
        UsageError: neither a tensor nor a mapping.
    """
    if isinstance(inputs, Tensor) or (isinstance(inputs, Mapping) and inputs):
        return inputs
    raise UsageError(f"inputs must be a tensor or a dict of forward's arguments, not {type(inputs).__name__}")


def invoke(module: nn.Module, inputs: Inputs) -> Tensor:
    """Call `module` and return its main output tensor."""
    result = module(**inputs) if isinstance(inputs, Mapping) else module(inputs)
    return main_output(result)


def main_output(result: Any) -> Tensor:
    """Return the logits, or the last state where there are none, of whatever a forward returned.

    Raises:
        AnatomyError: there is no floating-point tensor in it.
    """
    for name in _OUTPUTS:
        value = getattr(result, name, None)
        if value is None and isinstance(result, Mapping):
            value = result.get(name)
        if isinstance(value, Tensor):
            return value
    for value in _leaves(result):
        if value.is_floating_point():
            return value
    raise AnatomyError(
        f"the model returned {type(result).__name__} without a floating-point tensor in it: nothing to trace back "
        "from. Wrap the model in a module whose forward returns the logits or the last hidden state."
    )


def _leaves(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _leaves(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)


@contextmanager
def eager_math() -> Iterator[None]:
    """Run PyTorch's own layers by their written-out definition, not their fused inference shortcut.

    The shortcut of `nn.TransformerEncoderLayer` computes a whole block in one opaque operation, in which no addition
    can be seen, and compiled functions hide their operations in the same way.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
