"""What a branch is: attention, cross-attention, another mixer of positions, or an MLP; and where its norms stand."""

from __future__ import annotations

import math
from dataclasses import dataclass

from streamlens.anatomy import Kind, Placement, Point
from streamlens.discovery.graph import MATMULS, Graph, base_name
from streamlens.discovery.watch import Op

_FUSED_ATTENTION = ("scaled_dot_product", "flash_attention", "efficient_attention", "flex_attention")
_SOFTMAXES = frozenset({"_softmax", "_safe_softmax", "softmax"})
_BATCHED = frozenset({"bmm", "baddbmm", "matmul"})
_POSITION_MIXERS = frozenset(
    {
        "convolution", "cumsum", "_fft_r2c", "_fft_c2c", "logcumsumexp", "associative_scan", "conv1d", "cumprod",
        "mkldnn_rnn_layer",
    }
)  # fmt: skip
_PASSING = frozenset(
    {
        "mul", "add", "sub", "div", "_to_copy", "native_dropout", "dropout", "cat", "slice", "masked_fill", "where",
        "constant_pad_nd",
    }
)  # fmt: skip
NORM_OPS = frozenset(["native_layer_norm", "_fused_rms_norm", "rsqrt", "linalg_vector_norm", "var", "var_mean"])
_RANK: dict[Kind, int] = {"attn": 0, "cross_attn": 1, "mixer": 2, "mlp": 3}


@dataclass(frozen=True)
class Branch:
    """All that happens between the state that is read and the tensor that is written."""

    write: int
    nodes: tuple[int, ...]
    kind: Kind

    @property
    def rank(self) -> int:
        """Order of the writes of a parallel layer: attention first."""
        return _RANK[self.kind]


def branch_nodes(graph: Graph, write: int, within: set[int], start: int) -> tuple[int, ...]:
    """Return the tensors of the branch that ends in `write`, in execution order, without the state itself."""
    return tuple(sorted(n for n in graph.ancestors(write, within) if n != start))


class Classifier:
    """Tells the kind of a branch from the operations in it."""

    def __init__(self, graph: Graph, width: int, positions: int) -> None:
        self.graph = graph
        self.width = width
        self.positions = positions

    def branch(self, write: int, within: set[int], start: int, others: set[int]) -> Branch:
        """Describe the branch ending in `write`; `others` are the tensors of other streams."""
        nodes = branch_nodes(self.graph, write, within, start)
        return Branch(write, nodes, self.kind(nodes, within, others))

    def kind(self, nodes: tuple[int, ...], within: set[int], others: set[int]) -> Kind:
        """Name the kind: whether positions are mixed, and through what."""
        own = set(nodes)
        mixes = False
        for node in nodes:
            op = self.graph.op(node)
            assert op is not None
            name = base_name(op)
            if any(f in op.name for f in _FUSED_ATTENTION) or self._weighs_positions(node, own):
                foreign = self._foreign(own, within, others)
                return "cross_attn" if foreign else "attn"
            mixes = mixes or name in _POSITION_MIXERS or self._mixes(op, own)
        return "mixer" if mixes else "mlp"

    def _weighs_positions(self, node: int, own: set[int]) -> bool:
        """Tell whether this is a softmax whose result multiplies activations as a matrix (a router's does not)."""
        op = self.graph.op(node)
        if op is None or base_name(op) not in _SOFTMAXES:
            return False
        stack, seen = [node], {node}
        while stack:
            for after in self.graph.successors.get(stack.pop(), ()):
                made = self.graph.op(after)
                if after in seen or after not in own or made is None:
                    continue
                name = base_name(made)
                if name in _BATCHED and self._activations(made, own) == 2:
                    return True
                if name in _PASSING:
                    seen.add(after)
                    stack.append(after)
        return False

    def _activations(self, op: Op, own: set[int]) -> int:
        """Count the operands that are activations: of this branch, or of another stream (not weights)."""
        sources = {self.graph.canonical(i) for i in op.inputs}
        return sum(1 for s in sources if s in own or (self.graph.nodes[s].op is not None and self._from_activation(s)))

    def _from_activation(self, node: int) -> bool:
        return any(node in self.graph.reachable_from(s) for s in self.graph.sources_once)

    def _mixes(self, op: Op, own: set[int]) -> bool:
        name = base_name(op)
        operands = [self.graph.canonical(i) for i in op.inputs]
        if name in _BATCHED and sum(o in own for o in operands) == 2:
            return True
        if name not in ("mm", "addmm", *_BATCHED):  # a frozen weight may be multiplied document by document
            return False
        shape = self.graph.nodes[op.inputs[-2]].shape
        rows, width = math.prod(shape[:-1]), shape[-1]
        # A weight that contracts the position axis: (docs * d_model, positions) @ (positions, ...).
        return width == self.positions != self.width and rows % self.width == 0

    def _foreign(self, own: set[int], within: set[int], others: set[int]) -> bool:
        for node in own:
            for source in self.graph.inputs(node):
                if source not in within and source in others and self.graph.is_float(source):
                    return True
        return False


def norm_nodes(graph: Graph, nodes: tuple[int, ...]) -> list[int]:
    """Return those tensors of a branch that a norm's telling operation made."""
    return [n for n in nodes if (op := graph.op(n)) is not None and base_name(op) in NORM_OPS]


def placement(graph: Graph, branch: Branch, post: bool) -> tuple[Placement, int | None]:
    """Say where the norms of a sublayer stand, and return the tensor of the one in front of its branch."""
    matmuls = [n for n in branch.nodes if base_name(graph.op(n)) in MATMULS]  # type: ignore[arg-type]
    norms = norm_nodes(graph, branch.nodes)
    own = set(branch.nodes)
    first, final = matmuls[0], matmuls[-1]
    before = [n for n in norms if n in graph.ancestors(first, own)]
    after = [n for n in norms if n > final and final in graph.ancestors(n, own)]
    front = before[0] if before else None
    if post:
        return "post", front
    if before and after:
        return "sandwich", front
    if after:
        return "output", None
    return ("pre" if before else "none"), front


def home(graph: Graph, branch: Branch) -> str:
    """Return the path of the innermost module in which all weighted operations of the branch run."""
    stacks = []
    for node in branch.nodes:
        op = graph.op(node)
        if op is not None and base_name(op) in MATMULS:
            stacks.append([f.module for f in op.frames])
    shared = stacks[0]
    for stack in stacks[1:]:
        length = 0
        while length < min(len(shared), len(stack)) and shared[length] == stack[length]:
            length += 1
        shared = shared[:length]
    return shared[-1] if shared else ""


def value_mix(graph: Graph, branch: Branch, docs: int) -> tuple[Point | None, int | None]:
    """Return where the heads' outputs enter the output projection, and the number of heads."""
    if branch.kind not in ("attn", "cross_attn"):
        return None, None
    own = set(branch.nodes)
    mixed, heads = None, None
    for node in branch.nodes:
        op = graph.op(node)
        assert op is not None
        shape = graph.nodes[node].shape
        if any(f in op.name for f in _FUSED_ATTENTION):
            mixed, heads = node, graph.nodes[op.inputs[0]].shape[1]
        elif base_name(op) in _BATCHED and _follows_softmax(graph, node, own):
            mixed, heads = node, shape[0] // docs
    if mixed is None:
        return None, None
    for node in branch.nodes:
        op = graph.op(node)
        if op is None or base_name(op) not in ("mm", "addmm") or mixed not in graph.ancestors(node, own):
            continue
        for source in graph.inputs(node):
            slot = graph.argument_slot(op.call, source)
            if source in own and slot is not None and op.call is not None:
                return Point(op.call.site, slot), heads
        return None, heads
    return None, heads


def _follows_softmax(graph: Graph, node: int, own: set[int]) -> bool:
    stack, seen = [node], {node}
    while stack:
        current = stack.pop()
        for source in graph.inputs(current):
            op = graph.op(source)
            if source not in own or source in seen or op is None:
                continue
            if base_name(op) in _SOFTMAXES:
                return True
            if base_name(op) in _PASSING:
                seen.add(source)
                stack.append(source)
    return False
