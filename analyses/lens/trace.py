"""Run something once on a few tokens and note what it does to each token: a list of operations that can be run again.

The operations are ATen's, with whatever tensors they used besides the watched one (weights, constants) held as they
are. Shapes are left out, as in `streamlens.replay`, so that what was noted on (doc, position, d_model) runs on
(token, d_model): views that leave the last axis alone are passed over, and axes are counted from the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from streamlens.discovery.recording import along_last_axis
from streamlens.discovery.watch import tensors_in

_VIEWS = frozenset(
    {
        "view", "_unsafe_view", "reshape", "_reshape_alias", "transpose", "permute", "unsqueeze", "squeeze", "alias",
        "detach", "expand", "slice", "clone", "contiguous", "lift_fresh",
    }
)  # fmt: skip
_PRODUCTS = frozenset({"mm", "addmm", "bmm"})
_IN_PLACE = frozenset({"add", "sub", "mul", "div", "tanh", "neg", "clamp", "clamp_min", "clamp_max"})


class NotPerToken(Exception):
    """Something was done that cannot be written as a list of operations on single tokens."""


@dataclass(frozen=True)
class Slot:
    """Stands for a value that depends on the watched tensor."""

    index: int


@dataclass(frozen=True)
class Operation:
    """One operation on values of each token."""

    name: str
    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[int, ...]
    """Slots of its results."""
    width: int
    """Length of the last axis of its first result."""

    @property
    def is_product(self) -> bool:
        """Whether it multiplies the value with a constant matrix and does nothing else but add a constant."""
        return self.name in ("mm", "addmm") and [i for i, a in enumerate(self.args) if isinstance(a, Slot)] == [
            len(self.args) - 2
        ]

    @property
    def inputs(self) -> tuple[int, ...]:
        """Slots that it reads."""
        return tuple(slot.index for slot in _slots((self.args, self.kwargs)))

    def run(self, values: dict[int, Tensor]) -> None:
        """Run it and add its results to the values."""
        result = self.function(*_filled(self.args, values), **_filled(self.kwargs, values))
        results = result if isinstance(result, (tuple, list)) else (result,)
        values.update(zip(self.outputs, results, strict=False))

    def __call__(self, value: Tensor) -> Tensor:
        """Apply an operation that reads one value alone."""
        values = dict.fromkeys(self.inputs, value)
        self.run(values)
        return values[self.outputs[0]]

    def apply_(self, value: Tensor) -> None:
        """The same in place, without a second tensor of this size where the operation has such a form."""
        if self.name == "_to_copy":
            return  # the value is in the wider type already
        own = [a for a in self.args if not isinstance(a, Slot)]
        first = bool(self.args) and isinstance(self.args[0], Slot)
        if self.name in _IN_PLACE and (first or self.name in ("add", "mul")) and len(own) == len(self.args) - 1:
            getattr(value, f"{self.name}_")(*own, **self.kwargs)
        else:
            value.copy_(self(value))


@dataclass(frozen=True)
class Chain:
    """Operations from one value to another."""

    operations: tuple[Operation, ...]
    output: int
    start: int = 0
    """Slot of the value that they begin with."""
    module: Callable[[Tensor], Tensor] | None = None
    """A function to apply instead."""

    @classmethod
    def of(cls, module: Callable[[Tensor], Tensor] | None) -> Chain:
        """Return the chain that applies a function, or does nothing."""
        return cls((), 0, module=module)

    def __call__(self, value: Tensor) -> Tensor:
        """Run it on (token, width)."""
        if self.module is not None:
            return self.module(value)
        values = {self.start: value}
        for operation in self.operations:
            operation.run(values)
        return values[self.output]

    def in_float32(self) -> Chain:
        """Return the same operations in float32, whatever they were noted in; a module stays as it is.

        >>> x, weight = torch.randn(2, 4), torch.randn(4, 5).bfloat16()
        >>> chain = listen(lambda: start @ weight, start := x.bfloat16())
        >>> chain.in_float32()(x).dtype
        torch.float32
        """

        def single(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.float() if value.is_floating_point() else value
            return torch.float32 if isinstance(value, torch.dtype) and value.is_floating_point else value

        return replace(
            self,
            operations=tuple(
                replace(o, args=tuple(map(single, o.args)), kwargs={k: single(v) for k, v in o.kwargs.items()})
                for o in self.operations
            ),
        )

    def rest_after(self, value: Tensor, middle: Tensor) -> Chain | None:
        """Return what follows once `value` has become `middle`, bit for bit; None where it never does."""
        values = {self.start: value}
        if torch.equal(value, middle):
            return self
        for place, operation in enumerate(self.operations):
            operation.run(values)
            found = values[operation.outputs[0]]
            if found.shape == middle.shape and torch.equal(found, middle):
                later = self.operations[place + 1 :]
                return Chain(later, self.output, operation.outputs[0])
        return None

    def cut(self, place: int) -> tuple[Chain, Tensor, tuple[Operation, ...]]:
        """Cut it at a product: what comes before, the matrix (out, in), and what is done to the result.

        Raises:
            NotPerToken: what comes after reads something else than the product's result.
        """
        product, later = self.operations[place], self.operations[place + 1 :]
        source, matrix = product.args[-2:]
        after: list[Operation] = []
        if product.name == "addmm":
            if product.kwargs:
                raise NotPerToken("a bias with a factor")
            add = torch.ops.aten.add.Tensor
            after.append(Operation("add", add, (Slot(-1), product.args[0]), {}, product.outputs, product.width))
        current = product.outputs[0]
        for operation in later:
            if set(operation.inputs) != {current} or operation.width != product.width:
                raise NotPerToken("the logits are mixed with something else")
            after.append(operation)
            current = operation.outputs[0]
        if current != self.output:
            raise NotPerToken("the logits go elsewhere")
        before = _needed(self.operations[:place], source.index)
        return Chain(before, source.index), matrix.t(), tuple(after)


def listen(run: Callable[[], Tensor], start: Tensor) -> Chain:
    """Run something and note all operations that lead from `start` to the tensor that it returns.

    Args:
        run: what to run; it uses `start`.
        start: (doc, position, width) or (token, width).

    Raises:
        NotPerToken: the tokens are not treated each alone.

    >>> x, weight = torch.randn(2, 3, 4), torch.randn(4, 5)
    >>> chain = listen(lambda: 2.0 * (x.relu() @ weight), x)
    >>> [o.name for o in chain.operations]
    ['relu', 'mm', 'mul']
    >>> torch.equal(chain(x[0]), 2.0 * (x[0].relu() @ weight))
    True
    """
    heard = _Listener(start)
    with heard:
        output = run()
    return heard.chain(output)


class _Listener(TorchDispatchMode):
    def __init__(self, start: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self._alive = [start]  # ids are only unique while their tensors live
        self._slot = {id(start): 0}
        self._same: dict[int, int] = {}
        self._operations: list[Operation] = []
        self._problems: dict[int, str] = {}
        self._count = 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        keywords = kwargs or {}
        touched = [t for t in tensors_in((args, keywords)) if id(t) in self._slot]
        if not touched:
            return func(*args, **keywords)
        encoded = self._encode(args), self._encode(keywords)
        rank, shape = touched[0].ndim, tuple(touched[0].shape)
        result = func(*args, **keywords)
        results = result if isinstance(result, (tuple, list)) else (result,)
        outputs = tuple(self._new(t) for t in results if isinstance(t, Tensor))
        if outputs:
            first = next(t for t in results if isinstance(t, Tensor))
            self._note(func, encoded, outputs, first, rank, shape)
        return result

    def _new(self, tensor: Tensor) -> int:
        self._alive.append(tensor)
        self._slot[id(tensor)] = self._count
        self._count += 1
        return self._count - 1

    def _encode(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return Slot(self._slot[id(value)]) if id(value) in self._slot else value
        if isinstance(value, (tuple, list)):
            return type(value)(self._encode(v) for v in value)
        if isinstance(value, dict):
            return {k: self._encode(v) for k, v in value.items()}
        return value

    def _note(
        self, func: Any, encoded: Any, outputs: tuple[int, ...], first: Tensor, rank: int, shape: tuple[int, ...]
    ) -> None:
        name = func._schema.name.partition("::")[2]
        args, kwargs = encoded
        same_values = first.shape[-1:] == shape[-1:] and first.numel() == _product(shape)
        if name in _VIEWS and same_values and isinstance(args[0], Slot):
            self._same[outputs[0]] = args[0].index
            return
        try:
            name, func = _functional(name, func)
            placed = {k: v for k, v in kwargs.items() if k != "device"}
            args, kwargs = along_last_axis(func._schema, args, placed, rank, NotPerToken)
            args = tuple(_flat_constant(a, first.shape[-1]) if name not in _PRODUCTS else a for a in args)
            if name == "bmm":
                name, func, args = _as_mm(args)
        except NotPerToken as reason:
            self._problems[outputs[0]] = str(reason)
        width = int(first.shape[-1]) if first.ndim else 0
        self._operations.append(Operation(name, func, tuple(args), kwargs, outputs, width))

    def chain(self, output: Tensor) -> Chain:
        """Return what leads to `output`."""
        if id(output) not in self._slot:
            raise NotPerToken("the result does not depend on the state")
        renamed = [replace(o, args=self._renamed(o.args), kwargs=self._renamed(o.kwargs)) for o in self._operations]
        last = self._origin(self._slot[id(output)])
        needed = _needed(renamed, last)
        for operation in needed:
            if operation.outputs[0] in self._problems:
                raise NotPerToken(self._problems[operation.outputs[0]])
        return Chain(needed, last)

    def _origin(self, slot: int) -> int:
        while slot in self._same:
            slot = self._same[slot]
        return slot

    def _renamed(self, value: Any) -> Any:
        if isinstance(value, Slot):
            return Slot(self._origin(value.index))
        if isinstance(value, (tuple, list)):
            return type(value)(self._renamed(v) for v in value)
        if isinstance(value, dict):
            return {k: self._renamed(v) for k, v in value.items()}
        return value


def _needed(operations: Sequence[Operation], output: int) -> tuple[Operation, ...]:
    """Return the operations that lead to a slot, in order."""
    wanted, found = {output}, []
    for operation in reversed(operations):
        if wanted & set(operation.outputs):
            found.append(operation)
            wanted |= set(operation.inputs)
    return tuple(reversed(found))


def _functional(name: str, func: Any) -> tuple[str, Any]:
    """Return the out-of-place form of an operator."""
    if name in _VIEWS:
        raise NotPerToken(f"{name} takes tokens or dimensions apart")
    if not func._schema.is_mutable:
        return name, func
    plain = getattr(getattr(torch.ops.aten, name.rstrip("_"), None), func._schema.overload_name or "default", None)
    if plain is None:
        raise NotPerToken(f"{name} writes into its argument")
    return name.rstrip("_"), plain


def _flat_constant(value: Any, width: int) -> Any:
    """Strip the leading axes of a constant, which have length 1 unless it differs from token to token."""
    if not isinstance(value, Tensor) or value.ndim <= 1:
        return value
    if value.numel() not in (1, value.shape[-1]):
        raise NotPerToken(f"a constant of shape {tuple(value.shape)} may differ from token to token")
    return value.reshape(value.shape[-1])


def _as_mm(args: tuple[Any, ...]) -> tuple[str, Any, tuple[Any, ...]]:
    """Turn a batch of products with one and the same matrix into one product."""
    value, matrix = args
    if not isinstance(value, Slot) or not isinstance(matrix, Tensor) or (len(matrix) > 1 and matrix.stride(0) != 0):
        raise NotPerToken("a product with a matrix for each document")
    return "mm", torch.ops.aten.mm.default, (value, matrix[0])


def _product(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _slots(value: Any) -> Iterator[Slot]:
    if isinstance(value, Slot):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _slots(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _slots(item)


def _filled(value: Any, values: dict[int, Tensor]) -> Any:
    if isinstance(value, Slot):
        return values[value.index]
    if isinstance(value, (tuple, list)):
        return type(value)(_filled(v, values) for v in value)
    if isinstance(value, dict):
        return {k: _filled(v, values) for k, v in value.items()}
    return value
