"""The data flow of one watched pass, reduced to the question: through which tensors must everything pass?

A state of a residual stream is a *cut*: no path from the embedding to the output goes round it, because the skip and
the branch meet in it. Cuts are found without a table of architectures: in execution order, a tensor is a cut exactly
when no edge of the data-flow graph jumps over it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import cached_property

from streamlens.discovery.watch import Call, Node, Op, Ref, Trace

_VIEWS = frozenset(
    {
        "view", "_unsafe_view", "reshape", "_reshape_alias", "transpose", "permute", "t", "unsqueeze", "squeeze",
        "alias", "detach", "expand", "slice", "select", "movedim", "swapaxes", "narrow", "flatten", "unflatten",
        "lift_fresh", "clone", "contiguous",
    }
)  # fmt: skip
_LOOKUPS = frozenset({"embedding", "index_select", "index", "gather"})
MATMULS = frozenset(
    {
        "mm", "addmm", "bmm", "baddbmm", "convolution", "linear", "matmul", "dot", "mv", "addmv", "_convolution",
        "conv1d", "conv2d", "mkldnn_linear", "_grouped_mm", "_scaled_mm", "einsum",
    }
)  # fmt: skip


def base_name(op: Op) -> str:
    """Return the operator's name without namespace, overload and the underscore of its in-place form."""
    name = op.name.split(".")[1] if "." in op.name else op.name
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


class Graph:
    """Float data flow between tensors, with views of a tensor counted as the tensor itself."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.nodes = trace.nodes
        self._canonical: list[int] = []
        self._reachable: dict[int, set[int]] = {}
        for node in self.nodes:
            self._canonical.append(self._carried(node))

    def canonical(self, node: int) -> int:
        """Return the tensor that `node` is a view or plain copy of."""
        return self._canonical[node]

    def _carried(self, node: Node) -> int:
        op = node.op
        if op is None or not op.inputs:
            return node.index
        source = self.nodes[op.inputs[0]]
        same_values = source.dtype == node.dtype and _numel(source) == _numel(node)
        name = base_name(op)
        if op.name == "view.after_write" or (same_values and (name in _VIEWS or name == "_to_copy")):
            return self._canonical[source.index]
        return node.index

    def op(self, node: int) -> Op | None:
        """Return the operation that made this (canonical) tensor."""
        return self.nodes[node].op

    def inputs(self, node: int) -> tuple[int, ...]:
        """Return the canonical tensors that the operation which made `node` read, in argument order."""
        op = self.op(node)
        return () if op is None else tuple(self.canonical(i) for i in op.inputs)

    def is_float(self, node: int) -> bool:
        """Tell whether the tensor can carry activations."""
        return bool(self.nodes[node].dtype.is_floating_point)

    @cached_property
    def successors(self) -> dict[int, list[int]]:
        """For each canonical float tensor, the canonical float tensors computed directly from it."""
        result: dict[int, list[int]] = defaultdict(list)
        for node in self.nodes:
            if self.canonical(node.index) != node.index or not self.is_float(node.index):
                continue
            for source in set(self.inputs(node.index)):
                if self.is_float(source) and source != node.index:
                    result[source].append(node.index)
        return result

    def reachable(self, start: int) -> set[int]:
        """Return all tensors that depend on `start` through floating-point values, with itself."""
        return _closure([start], lambda n: self.successors.get(n, ()))

    def reachable_from(self, start: int) -> set[int]:
        """Return `reachable`, computed once for each start."""
        if start not in self._reachable:
            self._reachable[start] = self.reachable(start)
        return self._reachable[start]

    def ancestors(self, node: int, within: set[int]) -> set[int]:
        """Return all tensors of `within` that `node` depends on, with itself."""
        return _closure([node], lambda n: [i for i in self.inputs(n) if i in within])

    @cached_property
    def sources_once(self) -> list[int]:
        """`sources`, computed once."""
        return self.sources()

    def sources(self) -> list[int]:
        """Return where activations begin: look-ups of the model's inputs in a table, and floating-point inputs."""
        from_input = self._input_derived()
        found = []
        for node in self.nodes:
            if self.canonical(node.index) != node.index or not self.is_float(node.index):
                continue
            if node.is_input:
                found.append(node.index)
            elif node.op is not None and base_name(node.op) in _LOOKUPS:
                floats = [i for i in node.op.inputs if self.is_float(i)]
                indices = [i for i in node.op.inputs if not self.is_float(i)]
                if all(f not in from_input for f in floats) and any(i in from_input for i in indices):
                    found.append(node.index)
        return found

    def _input_derived(self) -> set[int]:
        derived = {n.index for n in self.nodes if n.is_input}
        for node in self.nodes:
            if node.op is not None and any(i in derived for i in node.op.inputs):
                derived.add(node.index)
        return derived

    def cuts(self, source: int, sink: int) -> tuple[list[int], set[int]]:
        """Return the tensors that every path from `source` to `sink` passes, in order, and all on such paths."""
        forward = self.reachable(source)
        if sink not in forward:
            return [], set()
        between = self.ancestors(sink, forward)
        furthest = source
        found = []
        for node in sorted(between):
            if furthest <= node:
                found.append(node)
            furthest = max([furthest, *(s for s in self.successors.get(node, ()) if s in between)])
        return found, between

    def result_slot(self, node: int) -> tuple[Call, str] | None:
        """Return the Python call that made this canonical tensor and returned it, with the slot it came back in."""
        op = self.op(node)
        if op is None or op.call is None:
            return None
        for slot, result in op.call.results.items():
            if self.canonical(result) == node:
                return op.call, slot
        return None

    def argument_slot(self, call: Call | None, node: int) -> str | None:
        """Return which argument of `call` is this canonical tensor, or None."""
        if call is None:
            return None
        for slot, argument in call.arguments.items():
            if self.canonical(argument) == node:
                return slot
        return None


def refs(value: object) -> Iterable[int]:
    """Yield the tensors named inside recorded arguments."""
    if isinstance(value, Ref):
        yield value.node
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from refs(item)


def _numel(node: Node) -> int:
    product = 1
    for size in node.shape:
        product *= size
    return product


def _closure(start: Iterable[int], neighbours: Callable[[int], Iterable[int]]) -> set[int]:
    seen = set(start)
    stack = list(seen)
    while stack:
        for other in neighbours(stack.pop()):
            if other not in seen:
                seen.add(other)
                stack.append(other)
    return seen
