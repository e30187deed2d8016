"""See into functions that PyTorch writes in Python but announces to interceptors as one opaque call.

`nn.MultiheadAttention` runs in such a function: without this, its output projection could not be told from the rest.
The function's own code runs, with its own arithmetic; only its announcement of itself is left out.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

_OPENED = frozenset({torch.nn.functional.multi_head_attention_forward})


def opened(func: Callable[..., Any]) -> Callable[..., Any] | None:
    """Return a twin of `func` whose inner calls can be intercepted, or None when it has no need of one."""
    return _twin(func) if func in _OPENED else None


@cache
def _twin(func: types.FunctionType) -> Callable[..., Any]:
    namespace = {**func.__globals__, "has_torch_function": lambda tensors: False}
    twin = types.FunctionType(func.__code__, namespace, func.__name__, func.__defaults__, func.__closure__)
    twin.__kwdefaults__ = func.__kwdefaults__
    return twin
