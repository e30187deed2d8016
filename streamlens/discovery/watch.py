"""Watch one forward pass: every operation, which tensors it joins, and which Python call of which module ran it.

Two interceptors work together. A dispatch mode sees every ATen operation, also those inside fused or composite
functions; a function mode sees the Python-level call that caused it, which is what can be found again in later
passes without slowing them down. Both leave values alone, so fake and meta tensors can be watched too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from streamlens.anatomy import RESULT, Site
from streamlens.calling import Inputs, eager_math, invoke
from streamlens.transparency import opened

_SMALL = 1024  # constants up to this many elements are kept, so that a recorded step can be replayed


@dataclass(frozen=True)
class Ref:
    """Stands for a tensor inside recorded arguments."""

    node: int


@dataclass
class Node:
    """One tensor value; a tensor that is changed in place becomes a new node."""

    index: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    op: Op | None = None
    name: str | None = None
    """Parameter or buffer name."""
    is_input: bool = False
    value: Tensor | None = None
    """Held for small constants that the model made outside of any watched operation."""


@dataclass(frozen=True)
class Frame:
    """One execution of one module."""

    module: str
    visit: int


@dataclass
class Call:
    """One Python-level call of a torch function."""

    site: Site
    arguments: dict[str, int]
    results: dict[str, int] = field(default_factory=dict)


@dataclass
class Op:
    """One ATen operation."""

    index: int
    name: str
    overload: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    frames: tuple[Frame, ...]
    call: Call | None


@dataclass
class Execution:
    """The span of operations that one module execution covers."""

    frame: Frame
    parent: Frame | None
    first: int
    last: int = -1
    output: Any = None
    """What it returned, with a `Ref` for each tensor."""


@dataclass
class Trace:
    """Everything that was seen in one forward pass."""

    nodes: list[Node]
    ops: list[Op]
    executions: list[Execution]
    output: int
    """The node of the model's main output."""
    arguments: dict[int, str]
    """Name of forward's argument (empty for a lone tensor) by input node."""


class _Recorder:
    def __init__(self, module: nn.Module) -> None:
        self.nodes: list[Node] = []
        self.ops: list[Op] = []
        self.executions: list[Execution] = []
        self.stack: list[Execution] = []
        self.call: Call | None = None
        self._visits: Counter[str] = Counter()
        self._ordinals: Counter[tuple[Frame, str]] = Counter()
        self._node_of: dict[int, int] = {}
        self._alive: list[Tensor] = []  # ids are only unique while their tensors live
        self._storages: dict[int, list[Tensor]] = {}
        self._names = {id(t): n for n, t in _named_tensors(module)}

    def node(self, tensor: Tensor) -> int:
        known = self._node_of.get(id(tensor))
        if known is not None:
            return known
        name = self._names.get(id(tensor))
        node = self._bind(tensor, None)
        node.name = name
        if name is None and tensor.numel() <= _SMALL and type(tensor) is Tensor and not tensor.is_meta:
            node.value = tensor.detach().clone()
        return node.index

    def input(self, tensor: Tensor) -> int:
        node = self._bind(tensor, None)
        node.is_input = True
        return node.index

    def _bind(self, tensor: Tensor, op: Op | None) -> Node:
        node = Node(len(self.nodes), tuple(tensor.shape), tensor.dtype, op)
        self.nodes.append(node)
        if id(tensor) not in self._node_of:
            self._alive.append(tensor)
            self._storages.setdefault(_storage(tensor), []).append(tensor)
        self._node_of[id(tensor)] = node.index
        return node

    def record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], run: Any) -> Any:
        before = [self.node(t) for t in tensors_in((args, kwargs))]
        template = _template(args, self.node), _template(kwargs, self.node)
        result = run()
        frames = tuple(e.frame for e in self.stack)
        op = Op(len(self.ops), str(func), func, *template, tuple(before), (), frames, self.call)
        self.ops.append(op)
        mutated = list(_written(func, args, kwargs))
        outputs = []
        for tensor in mutated:
            outputs.append(self._mutate(tensor, op))
        seen = {id(t) for t in mutated}
        for tensor in tensors_in(result):
            if id(tensor) not in seen:
                outputs.append(self._bind(tensor, op).index)
        op.outputs = tuple(outputs)
        return result

    def _mutate(self, tensor: Tensor, op: Op) -> int:
        """Give a new node to the tensor and to each other tensor that looks at the same memory."""
        node = self._bind(tensor, op)
        for other in self._storages.get(_storage(tensor), ()):
            if other is tensor or id(other) in self._names:
                continue
            whole = other.numel() == tensor.numel()
            inputs = (node.index,) if whole else (node.index, self._node_of[id(other)])
            name = "view.after_write" if whole else "view.partly_written"
            echo = Op(len(self.ops), name, None, (Ref(node.index),), {}, inputs, (), op.frames, op.call)
            self.ops.append(echo)
            echo.outputs = (self._bind(other, echo).index,)
        return node.index

    def enter(self, path: str) -> None:
        frame = Frame(path, self._visits[path])
        self._visits[path] += 1
        parent = self.stack[-1].frame if self.stack else None
        execution = Execution(frame, parent, len(self.ops))
        self.executions.append(execution)
        self.stack.append(execution)

    def leave(self, output: Any) -> None:
        execution = self.stack.pop()
        execution.last = len(self.ops)
        execution.output = _template(output, self.node)

    @contextmanager
    def calling(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Call | None]:
        if not self.stack:
            yield None
            return
        frame = self.stack[-1].frame
        ordinal = self._ordinals[frame, name]
        self._ordinals[frame, name] += 1
        arguments = {
            str(slot): self.node(value)
            for slot, value in (*enumerate(args), *kwargs.items())
            if isinstance(value, Tensor)
        }
        self.call = Call(Site(frame.module, frame.visit, name, ordinal), arguments)
        try:
            yield self.call
        finally:
            self.call = None

    def finish_call(self, call: Call, result: Any) -> None:
        if isinstance(result, Tensor):
            call.results[RESULT] = self.node(result)


class _Dispatch(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self.recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        keywords = kwargs or {}
        return self.recorder.record(func, args, keywords, lambda: func(*args, **keywords))


class _Functions(TorchFunctionMode):
    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        keywords = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__"):
            return func(*args, **keywords)
        twin = opened(func)
        if twin is not None:
            with self:
                return twin(*args, **keywords)
        with self.recorder.calling(name, args, keywords) as call:
            result = func(*args, **keywords)
            if call is not None:
                self.recorder.finish_call(call, result)
        return result


def watch(module: nn.Module, inputs: Inputs) -> Trace:
    """Run `module` once on `inputs` and return all that happened in it.

    The module is left as it was: same mode, no hook, also after an exception.
    """
    recorder = _Recorder(module)
    named = inputs if isinstance(inputs, Mapping) else {"": inputs}
    arguments = {recorder.input(t): name for name, t in named.items() if isinstance(t, Tensor)}
    paths = {id(child): path for path, child in module.named_modules()}
    handles = []
    try:
        for path, child in module.named_modules():
            del path
            handles.append(child.register_forward_pre_hook(lambda m, _: recorder.enter(paths[id(m)]), prepend=True))
            handles.append(child.register_forward_hook(lambda m, _, output: recorder.leave(output)))
        with torch.no_grad(), eager_math(), _Dispatch(recorder), _Functions(recorder):
            output = invoke(module, inputs)
    finally:
        for handle in reversed(handles):
            handle.remove()
    return Trace(recorder.nodes, recorder.ops, recorder.executions, recorder.node(output), arguments)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_buffers()
    yield from module.named_parameters()


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested lists, tuples and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)


def _template(value: Any, node: Any) -> Any:
    if isinstance(value, Tensor):
        return Ref(node(value))
    if isinstance(value, (list, tuple)):
        return tuple(_template(v, node) for v in value)
    if isinstance(value, dict):
        return {k: _template(v, node) for k, v in value.items()}
    return value


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        yield from tensors_in(value)
