"""Leave out module executions that a run from a later state does not need, and tell afterwards which they were."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from streamlens.anatomy import Bypass, Stream
from streamlens.discovery.bypass import FLAT, STATE
from streamlens.replay import dtype_named


class _PassingOver:
    """Stands in for a module's forward: gives the filler at the planned executions, and runs the others."""

    def __init__(self, module: nn.Module, visits: Mapping[int, Bypass], filler: Tensor) -> None:
        self.visits = visits
        self._original = module.forward
        self._filler = filler
        self._count = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bypass = self.visits.get(self._count)
        self._count += 1
        return self._original(*args, **kwargs) if bypass is None else _fill(bypass.output, self._filler)


@contextmanager
def passing_over(module: nn.Module, stream: Stream, index: int, filler: Tensor) -> Iterator[None]:
    """Leave out, while the context lasts, the module executions that a run from state `index` does not need.

    Args:
        module: the model.
        stream: the stream that the run starts in.
        index: the state that it starts from.
        filler: (doc, position, d_model) in the model's own layout, what the executions return instead.
    """
    paths = dict(module.named_modules())
    planned: dict[str, dict[int, Bypass]] = {}
    for bypass in stream.bypasses:
        if index >= bypass.state:
            planned.setdefault(bypass.module, {})[bypass.visit] = bypass
    with ExitStack() as stack:
        for path, visits in planned.items():
            stack.enter_context(_replaced(paths[path], visits, filler))
        yield


def passed_over(paths: Mapping[str, nn.Module], path: str, visit: int) -> bool:
    """Tell whether an execution is left out at the moment, by itself or with a module around it.

    Args:
        paths: every module of the model by its path.
        path: the module.
        visit: which of its executions.
    """
    if visit in _planned(paths[path]):
        return True
    around = path
    while around:
        around = around.rpartition(".")[0]
        if _planned(paths[around]):
            return True  # whole, for what runs inside a module that is left out runs once
    # A module that is registered in two places has only one of its paths here.
    return any(_planned(other) and any(m is paths[path] for m in other.modules()) for other in paths.values())


def _planned(module: nn.Module) -> Mapping[int, Bypass]:
    forward = module.__dict__.get("forward")
    return forward.visits if isinstance(forward, _PassingOver) else {}


@contextmanager
def _replaced(module: nn.Module, visits: Mapping[int, Bypass], filler: Tensor) -> Iterator[None]:
    own = module.__dict__.get("forward")
    module.forward = _PassingOver(module, visits, filler)
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def _fill(template: Any, filler: Tensor) -> Any:
    if isinstance(template, tuple):
        return tuple(_fill(t, filler) for t in template)
    kind, _, dtype = template.partition(":") if isinstance(template, str) else ("", "", "")
    if kind not in (STATE, FLAT):
        return template
    laid_out = filler if kind == STATE else filler.reshape(-1, filler.shape[-1])
    return laid_out.to(dtype_named(dtype)) if dtype else laid_out
