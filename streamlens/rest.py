"""A model at rest while it is looked at: in eval mode and frozen, and afterwards as its owner left it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import ParamSpec, TypeVar

from torch import nn

from streamlens.checkpoint.model import Model
from streamlens.errors import UsageError

Arguments = ParamSpec("Arguments")
Answer = TypeVar("Answer")


@contextmanager
def at_rest(module: nn.Module) -> Iterator[None]:
    """Hold a module in eval mode, its parameters frozen; on the way out it is as it was, also after an exception.

    May be nested. It costs a walk over the modules where they are at rest already.

    >>> layer = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    >>> with at_rest(layer):
    ...     layer[1].training, layer[0].weight.requires_grad
    (False, False)
    >>> layer[1].training, layer[0].weight.requires_grad
    (True, True)
    """
    modes = {found: found.training for found in module.modules()}
    flags = {parameter: parameter.requires_grad for parameter in module.parameters()}
    try:
        if any(modes.values()):
            module.eval()
        for parameter in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        if any(modes.values()):
            module.train(modes[module])  # a module may do more in it than set the flag, as in eval() above
        for found, training in modes.items():
            found.training = training
        for parameter, wanted in flags.items():
            parameter.requires_grad_(wanted)


def resting(door: Callable[Arguments, Answer]) -> Callable[Arguments, Answer]:
    """Let a function find every model among its arguments at rest: modules, loaded models, and sources that run one.

    What belongs to the caller, who may be in the middle of training it, is given back as it was.
    """

    @functools.wraps(door)
    def held(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Answer:
        with ExitStack() as stack:
            for value in (*args, *kwargs.values()):
                if (module := _module_in(value)) is not None:
                    stack.enter_context(at_rest(module))
            return door(*args, **kwargs)

    return held


def _module_in(value: object) -> nn.Module | None:
    """The module that an argument brings; a capture's model, which is not loaded before it is asked for, is ours."""
    if not isinstance(value, Model | nn.Module):
        value = getattr(value, "__dict__", {}).get("model")
    return value.module if isinstance(value, Model) else value if isinstance(value, nn.Module) else None


def refuse_dropout(module: nn.Module) -> None:
    """Refuse a module that would drop values at random in its next pass.

    Raises:
        UsageError: one of its modules is in train mode and has a dropout above 0.

    >>> refuse_dropout(nn.Dropout(0.1).eval())
    >>> refuse_dropout(nn.Dropout(0.0))
    >>> refuse_dropout(nn.Dropout(0.1))
    Traceback (most recent call last):
    streamlens.errors.UsageError: the model is in train mode and would drop values at random: call .eval() first
    """
    for path, found in module.named_modules():
        if found.training and _drops(found):
            where = f" in {path}" if path else ""
            raise UsageError(f"the model is in train mode and would drop values at random{where}: call .eval() first")


def _drops(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    # What calls the function instead keeps its rate as a number: `dropout`, `attention_dropout`, `drop_prob`.
    return any("drop" in name and isinstance(rate, float) and rate > 0 for name, rate in vars(module).items())
