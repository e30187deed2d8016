"""Find the sites of an anatomy again in a live forward pass, to look at a tensor there or to put another in its place.

Forward hooks say which module is executing; a function mode sees each call of a torch function that the module's own
code makes. Between them a `Site` is recognised without touching the model's arithmetic, also under autograd.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from streamlens.anatomy import RESULT, Anatomy, Point, Site
from streamlens.calling import eager_math
from streamlens.errors import AnatomyError
from streamlens.transparency import opened

Reaction = Callable[[Tensor], Tensor | None]
"""Called with the tensor at a point; what it returns takes the tensor's place, None leaves it."""


class Interception(TorchFunctionMode):
    """Calls a reaction at each point, for as long as the context lasts.

    Several may be nested; each sees what the ones around it leave. Hooks are registered on entry and removed on
    exit in reverse order, also after an exception.

    Args:
        module: the model that `anatomy` describes.
        anatomy: its anatomy.
        reactions: what to do at each point. Reactions at one call run in the given order.
        settled: called after the reactions to a call's arguments, before the call itself may overwrite them.
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
        self._reactions: dict[Site, list[tuple[str, Reaction]]] = {}
        for point, reaction in reactions.items():
            self._reactions.setdefault(point.site, []).append((point.slot, reaction))
        self._functions = frozenset(site.function for site in self._reactions)
        self._modules = frozenset(site.module for site in self._reactions)
        self._handles: list[RemovableHandle] = []
        self._stack: list[tuple[str, int]] = []
        self._visits: Counter[str] = Counter()
        self._ordinals: Counter[tuple[str, int, str]] = Counter()
        self._math = eager_math()

    def __enter__(self) -> Self:
        paths = dict(self._module.named_modules())
        for path in dict.fromkeys(("", *self._followed)):
            if path not in paths:
                raise AnatomyError(f"this model has no module {path!r}: the anatomy belongs to another model")
        self._math.__enter__()
        for path in dict.fromkeys(("", *self._followed)):
            child = paths[path]
            self._handles.append(child.register_forward_pre_hook(self._entering(path), prepend=True))
            self._handles.append(child.register_forward_hook(self._leaving))
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
        self._math.__exit__(None, None, None)

    @contextmanager
    def _again(self) -> Iterator[None]:
        """Intercept inside a call that is already being intercepted."""
        super().__enter__()  # type: ignore[no-untyped-call]  # torch's own
        try:
            yield
        finally:
            super().__exit__(None, None, None)  # type: ignore[no-untyped-call]  # torch's own

    def _entering(self, path: str) -> Callable[[nn.Module, Any], None]:
        def enter(module: nn.Module, args: Any) -> None:
            if not self._stack:
                self._visits.clear()
                self._ordinals.clear()
            self._stack.append((path, self._visits[path]))
            self._visits[path] += 1

        return enter

    def _leaving(self, module: nn.Module, args: Any, output: Any) -> None:
        self._stack.pop()

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
        if module not in self._modules:
            return func(*args, **keywords)
        ordinal = self._ordinals[module, visit, name]
        self._ordinals[module, visit, name] += 1
        reactions = self._reactions.get(Site(module, visit, name, ordinal))
        if reactions is None:
            return func(*args, **keywords)
        with torch._C.DisableTorchFunctionSubclass():
            args, keywords = self._before(name, reactions, args, keywords)
        result = func(*args, **keywords)
        for slot, reaction in reactions:
            if slot == RESULT:
                replaced = reaction(result)
                result = result if replaced is None else replaced
        return result

    def _before(
        self, name: str, reactions: list[tuple[str, Reaction]], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        for slot, reaction in reactions:
            if slot == RESULT:
                continue
            old = args[int(slot)] if slot.isdigit() else kwargs[slot]
            new = reaction(old)
            if new is None:
                continue
            if slot == "0" and name.endswith("_"):
                new = new.clone()  # the call is about to overwrite it
            if slot.isdigit():
                args = (*args[: int(slot)], new, *args[int(slot) + 1 :])
            else:
                kwargs = {**kwargs, slot: new}
        if self._settled is not None:
            self._settled()
        return args, kwargs
