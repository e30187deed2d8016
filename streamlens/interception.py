"""Find the sites of an anatomy again in a live forward pass, to look at a tensor there or to put another in its place.

Forward hooks say which module is executing; a function mode sees each call of a torch function that the module's own
code makes. Between them a `Site` is recognised without touching the model's arithmetic, also under autograd.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils.hooks import RemovableHandle

from streamlens.anatomy import RESULT, Anatomy, Point, Site
from streamlens.calling import eager_math
from streamlens.errors import AnatomyError
from streamlens.passing import passed_over
from streamlens.transparency import opened

Reaction = Callable[[Tensor], Tensor | None]
"""Called with the tensor at a point; what it returns takes the tensor's place, None leaves it."""

_REMEDY = "discover(module, inputs) with them"
_ANOTHER_WAY = f"these inputs take another way through the model than those it was discovered on: {_REMEDY}"


class _Depth(threading.local):
    """How many reactions are at work in this thread, each within the one before."""

    value = 0


_REACTING = _Depth()


@dataclass(slots=True, eq=False)
class _Stop:
    """What happens at a site, and when it last did."""

    reactions: list[tuple[str, int | None, Reaction]] = field(default_factory=list)
    """Slot, width of the tensor where it is known, reaction."""
    met: int = 0
    """Number of the last pass that came here."""
    apart: bool = False
    """Whether it was met when a part of the model was called by itself, as `generate` calls an encoder."""


class Interception(TorchFunctionMode):
    """Calls a reaction at each point, for as long as the context lasts, in the thread that entered it.

    Several may be nested; each sees what the ones around it leave. What a reaction itself computes is no part of the
    pass. Hooks are registered on entry and removed on exit in reverse order, also after an exception.

    Sites are told apart by counting calls, so inputs for which the model makes more or fewer of them would shift
    them. Therefore every pass must come to every site, except in what `run_from` leaves out, and find a tensor there
    that can be the one looked for.

    Args:
        module: the model that `anatomy` describes.
        anatomy: its anatomy.
        reactions: what to do at each point. Reactions at one call run in the given order.
        settled: called after the reactions to a call's arguments, before the call itself may overwrite them.

    Raises:
        AnatomyError: on entry: the anatomy belongs to another model; from a forward pass: a site was not met, or
            something else than a tensor of the stream was there.
    """

    def __init__(
        self,
        module: nn.Module,
        anatomy: Anatomy,
        reactions: Mapping[Point, Reaction],
        settled: Callable[[], None] | None = None,
    ) -> None:
        super().__init__()
        self._settled = settled
        self._module = module
        self._followed = anatomy.calls
        self._stops: dict[Site, _Stop] = {}
        for point, reaction in reactions.items():
            stop = self._stops.setdefault(point.site, _Stop())
            stop.reactions.append((point.slot, anatomy.widths.get(point), reaction))
        self._functions = frozenset(site.function for site in self._stops)
        self._modules = frozenset(site.module for site in self._stops)
        self._handles: list[RemovableHandle] = []
        self._stack: list[tuple[str, int]] = []
        self._visits: Counter[str] = Counter()
        self._ordinals: Counter[tuple[str, int, str]] = Counter()
        self._math = eager_math()
        self._pass = 0
        self._paths: dict[str, nn.Module] = {}
        self._depth = 0
        self._handled: BaseException | None = None

    def __enter__(self) -> Self:
        paths = dict(self._module.named_modules())
        for path in dict.fromkeys(("", *self._followed)):
            if path not in paths:
                raise AnatomyError(f"this model has no module {path!r}: the anatomy belongs to another model")
        self._paths, self._depth = paths, _REACTING.value
        self._math.__enter__()
        for path in dict.fromkeys(("", *self._followed)):
            child = paths[path]
            self._handles.append(child.register_forward_pre_hook(self._entering(path), prepend=True))
            # Also when the module raises: what it was in the middle of must not count for the next pass.
            self._handles.append(child.register_forward_hook(self._leaving(path), always_call=True))
        super().__enter__()  # type: ignore[no-untyped-call]  # torch's own
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]  # torch's own
        for handle in reversed(self._handles):
            handle.remove()
        self._handles.clear()
        self._stack.clear()
        self._paths, self._handled = {}, None
        for stop in self._stops.values():
            stop.apart = False
        self._math.__exit__(None, None, None)

    def demand(self) -> None:
        """Raise if the last pass, or the one under way, has not come to every site.

        Raises:
            AnatomyError: it has not; the message names the first such site.
        """
        missed = [site for site, stop in self._stops.items() if stop.met != self._pass and not self._excused(site)]
        if missed:
            others = f" (and {len(missed) - 1} more)" if len(missed) > 1 else ""
            raise AnatomyError(f"the forward pass did not come to {missed[0]}{others}: {_ANOTHER_WAY}")

    def _excused(self, site: Site) -> bool:
        """Tell whether a site need not be met: left out on purpose, or its module was called before, by itself."""
        ran = self._visits[site.module] > site.visit
        return (self._stops[site].apart and not ran) or passed_over(self._paths, site.module, site.visit)

    @contextmanager
    def _again(self) -> Iterator[None]:
        """Intercept inside a call that is already being intercepted."""
        super().__enter__()  # type: ignore[no-untyped-call]  # torch's own
        try:
            yield
        finally:
            super().__exit__(None, None, None)  # type: ignore[no-untyped-call]  # torch's own

    def _counts(self) -> bool:
        """Tell whether a module's execution is part of the pass: not in another thread, not within a reaction."""
        active = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]  # torch's own
        return _REACTING.value == self._depth and self in active

    def _entering(self, path: str) -> Callable[[nn.Module, Any], None]:
        def enter(module: nn.Module, args: Any) -> None:
            if not self._counts():
                return
            if not self._stack:
                self._visits.clear()
                self._ordinals.clear()
                self._pass += 1
                self._handled = sys.exception()
            self._stack.append((path, self._visits[path]))
            self._visits[path] += 1

        return enter

    def _leaving(self, path: str) -> Callable[[nn.Module, Any, Any], None]:
        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if not self._stack or self._stack[-1][0] != path or not self._counts():
                return
            self._stack.pop()
            # An exception on its way out, as opposed to one that the caller was handling already, must come through.
            if self._stack or sys.exception() is not self._handled:
                return
            if path == "":
                self.demand()
                return
            for stop in self._stops.values():
                stop.apart = stop.apart or stop.met == self._pass

        return leave

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        keywords = kwargs or {}
        twin = opened(func)
        if twin is not None:
            with self._again():
                return twin(*args, **keywords)
        name = getattr(func, "__name__", "")
        if name not in self._functions or not self._stack:
            return func(*args, **keywords)
        module, visit = self._stack[-1]
        if module not in self._modules or _REACTING.value != self._depth:
            return func(*args, **keywords)
        ordinal = self._ordinals[module, visit, name]
        self._ordinals[module, visit, name] += 1
        site = Site(module, visit, name, ordinal)
        stop = self._stops.get(site)
        if stop is None:
            return func(*args, **keywords)
        stop.met = self._pass
        with _reacting(), torch._C.DisableTorchFunctionSubclass():
            args, keywords = self._before(site, stop, args, keywords)
        result = func(*args, **keywords)
        with _reacting():
            for slot, width, reaction in stop.reactions:
                if slot == RESULT:
                    replaced = reaction(_checked(site, result, width))
                    result = result if replaced is None else replaced
        return result

    def _before(
        self, site: Site, stop: _Stop, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        for slot, width, reaction in stop.reactions:
            if slot == RESULT:
                continue
            place = int(slot) if slot.isdigit() else None
            given = kwargs.get(slot) if place is None else args[place] if place < len(args) else None
            new = reaction(_checked(site, given, width))
            if new is None:
                continue
            if slot == "0" and site.function.endswith("_"):
                new = new.clone()  # the call is about to overwrite it
            if place is None:
                kwargs = {**kwargs, slot: new}
            else:
                args = (*args[:place], new, *args[place + 1 :])
        if self._settled is not None:
            self._settled()
        return args, kwargs


@contextmanager
def _reacting() -> Iterator[None]:
    """What is called in here is not the model's own doing, to no interception that is active already."""
    _REACTING.value += 1
    try:
        yield
    finally:
        _REACTING.value -= 1


def _checked(site: Site, value: Any, width: int | None) -> Tensor:
    if isinstance(value, Tensor):
        if width is None or (value.shape[-1:] == (width,) and value.is_floating_point()):
            return value
        what = f"a tensor of {str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
    else:
        what = f"{type(value).__name__}, not a tensor"
    wanted = "" if width is None else f" where the stream is {width} wide"
    raise AnatomyError(f"{site} was given {what}{wanted}: {_ANOTHER_WAY}")
