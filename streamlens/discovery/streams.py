"""One watched pass -> the anatomy of any transformer, with no table of architectures or module names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from streamlens.anatomy import Anatomy, Kind, Norm, Point, State, Step, Stream, Sublayer
from streamlens.calling import check_inputs, without_cache
from streamlens.checkpoint.model import Model, module_of
from streamlens.discovery import bypass, embedding, head, naming
from streamlens.discovery.branches import Branch, Classifier, home, norm_nodes, placement, value_mix
from streamlens.discovery.chain import Diamond, Puzzle, Segment, Term, diamonds, split_parallel
from streamlens.discovery.graph import Graph, base_name
from streamlens.discovery.layout import is_position_first, main_input, with_mix_layouts
from streamlens.discovery.norms import find_norms
from streamlens.discovery.recording import NotReplayable, record
from streamlens.discovery.watch import Op, watch
from streamlens.errors import AnatomyError
from streamlens.rest import resting


@resting
def discover(model: Model | nn.Module, inputs: Any) -> Anatomy:
    """Find the residual streams of a model by watching one forward pass, in eval mode; the model is left as it was.

    Args:
        model: any transformer, loaded or as a module; real, fake or meta weights.
        inputs: a small batch for its forward: a tensor, or a dict of arguments.

    Returns:
        The streams, sublayers, embedding parts and head.

    Raises:
        AnatomyError: no residual stream was found, or one that is mixed in a way that a single chain of additions
            cannot describe; the message names the addition that puzzled.
        UsageError: `inputs` is neither a tensor nor a dict, or `model` is no module.

    Example:
        >>> import torch
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
        >>> discover(model, torch.randn(2, 5, 8)).stream().labels
        ('0_attn_out', '0_mlp_out', '1_attn_out', '1_mlp_out')
    """
    module = module_of(model)
    prepared = without_cache(module, check_inputs(inputs))
    graph = Graph(watch(module, prepared))
    segments = _segments(graph)
    position_first = is_position_first(module, prepared)
    docs = main_input(prepared)[1].shape[1 if position_first else 0]
    builders = [_StreamBuilder(graph, segment, position_first, docs) for segment in segments]
    names = naming.stream_names(
        len(builders), lambda i: any(b.kind == "cross_attn" for b in builders[i].branches), [b.place for b in builders]
    )
    built = (builder.build(name) for builder, name in zip(builders, names, strict=True))
    streams = tuple(with_mix_layouts(module, stream) for stream in built)
    final = builders[-1]
    return Anatomy(streams, head.describe(graph, names[-1], final.states[-1]), _followed(graph, streams))


def _segments(graph: Graph) -> list[Segment]:
    """Return the longest chain of each source, in order of execution."""
    sink = graph.canonical(graph.trace.output)
    puzzles: list[Puzzle] = []
    found: list[Segment] = []
    for source in graph.sources_once:
        cuts, between = graph.cuts(source, sink)
        steps, odd = diamonds(graph, cuts, between)
        puzzles += odd
        found += _joined(graph, source, cuts, steps)
    chosen: list[Segment] = []
    taken: set[int] = set()
    for segment in sorted(found, key=lambda s: -len(s.diamonds)):
        ends = {d.end for d in segment.diamonds}
        if not ends & taken:
            chosen.append(segment)
            taken |= ends
    chosen.sort(key=lambda s: s.diamonds[0].end)
    inside = {n for s in chosen for d in s.diamonds for n in d.region}
    unexplained = [p for p in puzzles if p.node not in taken | inside]
    if not chosen or _broken(graph, chosen, unexplained):
        raise AnatomyError(_explain(graph, unexplained))
    return chosen


def _joined(graph: Graph, source: int, cuts: list[int], steps: list[Diamond]) -> list[Segment]:
    """Join neighbouring diamonds between which each token is treated alone."""
    runs: list[list[Diamond]] = []
    for step in steps:
        if runs and _continues(graph, runs[-1][-1].end, step.start):
            runs[-1].append(step)
        else:
            runs.append([step])
    return [Segment(source, tuple(run), tuple(cuts)) for run in runs]


def _continues(graph: Graph, end: int, start: int) -> bool:
    if end == start:
        return True
    try:
        record(graph, start, {end: "@state"})
    except NotReplayable:
        return False
    return True


def _broken(graph: Graph, chosen: list[Segment], puzzles: list[Puzzle]) -> bool:
    """Tell whether an addition that is not understood stands on the way of a stream that was found."""
    cuts = {c for s in chosen for c in s.cuts}
    first = min(s.diamonds[0].start for s in chosen)
    return any(p.node in cuts and p.node > first for p in puzzles)


def _explain(graph: Graph, puzzles: Sequence[Puzzle]) -> str:
    if not puzzles:
        return (
            "no residual stream: no addition in this model adds the output of a branch with weights to the state that "
            "the branch read. streamlens needs a model with skip connections."
        )
    lines = []
    for puzzle in puzzles:
        op = graph.op(puzzle.node)
        assert op is not None
        where = op.frames[-1].module if op.frames else ""
        shape = tuple(graph.nodes[puzzle.node].shape)
        lines.append(f"{op.name} in {where or 'the model'} (shape {shape}): {puzzle.reason}")
    return (
        "the residual stream of this model is not one chain of additions. What puzzled:\n  "
        + "\n  ".join(list(dict.fromkeys(lines))[:3])
        + "\nstreamlens follows streams in which x + branch(x) is the only way past a branch."
    )


class _StreamBuilder:
    """Turns one segment into a `Stream`."""

    def __init__(self, graph: Graph, segment: Segment, position_first: bool, docs: int) -> None:
        self.graph = graph
        self.segment = segment
        self.position_first = position_first
        first = segment.diamonds[0].start
        shape = graph.nodes[first].shape
        self.width = shape[-1]
        self._docs = docs
        positions = math.prod(shape) // (docs * self.width)
        self.others = self._other_streams()
        classifier = Classifier(graph, self.width, positions)

        def kind_of(node: int, within: set[int]) -> Kind:
            return classifier.branch(node, within, diamond.start, self.others).kind

        self.diamonds: list[Diamond] = []
        for diamond in segment.diamonds:
            self.diamonds.append(split_parallel(graph, diamond, kind_of))
        self.branches: list[Branch] = []
        self.terms: list[tuple[int, Term]] = []
        for index, diamond in enumerate(self.diamonds):
            within = set(diamond.region) | {diamond.start, diamond.end}
            pairs = [(classifier.branch(t.node, within, diamond.start, self.others), t) for t in diamond.terms]
            for branch, term in sorted(pairs, key=lambda p: (p[0].rank, p[0].write)):
                self.branches.append(branch)
                self.terms.append((index, term))
        self.states = [d.start for d in self.diamonds] + [self._final_state()]

    def _other_streams(self) -> set[int]:
        own = self.graph.reachable_from(self.segment.source)
        others: set[int] = set()
        for source in self.graph.sources_once:
            others |= self.graph.reachable_from(source)
        return others - own

    def _final_state(self) -> int:
        """Return x_K: behind the last sum, the same norm follows that follows the sums before it, if one does."""
        starts = [d.start for d in self.diamonds[1:]]
        ends = [d.end for d in self.diamonds]
        pattern = self._operators(ends[-2], starts[-1]) if starts else ()
        after = [c for c in self.segment.cuts if c > ends[-1]]
        candidates = [c for c in after if self._operators(ends[-1], c) == pattern] if pattern else []
        return candidates[0] if candidates else ends[-1]

    def _operators(self, start: int, end: int) -> tuple[str, ...]:
        if start == end:
            return ()
        try:
            instructions, _ = record(self.graph, end, {start: "@state"})
        except NotReplayable:
            return ("?",)
        return tuple(i.operator for i in instructions)

    @property
    def place(self) -> str:
        """Path of the module around the first addition."""
        return self.terms[0][1].addition.frames[-1].module if self.terms[0][1].addition.frames else ""

    def build(self, name: str) -> Stream:
        """Assemble the stream."""
        sublayers = self._sublayers()
        steps, values = self._steps()
        parts, instructions, part_values = embedding.describe(self.graph, self.segment.source, self.states[0])
        norms: tuple[Norm, ...] = find_norms(self.graph, instructions, part_values, "embed", 0)
        for index, step in enumerate(steps):
            label = sublayers[step.sublayers[-1]].label
            norms += find_norms(self.graph, step.instructions, values[index], label, index + 1)
        norms += head.final_norm(self.graph, self.states[-1], self.segment.cuts)
        return Stream(
            name,
            self.width,
            self.position_first,
            parts,
            instructions,
            sublayers,
            steps,
            tuple(self._state(i) for i in range(len(self.states))),
            norms,
            bypass.find(self.graph, self.states),
        )

    def _sublayers(self) -> tuple[Sublayer, ...]:
        places = [
            naming.Place(step, branch.kind, term.addition.frames, self._used(branch))
            for branch, (step, term) in zip(self.branches, self.terms, strict=True)
        ]
        layers = naming.layer_indices(places)
        names = naming.labels(layers, [b.kind for b in self.branches])
        result = []
        for index, (branch, (step, term)) in enumerate(zip(self.branches, self.terms, strict=True)):
            diamond = self.diamonds[step]
            post = self.states[step + 1] != diamond.end and bool(
                norm_nodes(self.graph, tuple(n for n in range(diamond.end + 1, self.states[step + 1] + 1)))
            )
            where, front = placement(self.graph, branch, post)
            mix, heads = value_mix(self.graph, branch, self._docs)
            front_op = None if front is None else self.graph.op(front)
            result.append(
                Sublayer(
                    index,
                    layers[index],
                    branch.kind,
                    names[index],
                    home(self.graph, branch),
                    where,
                    step,
                    self._argument(term.addition, term.node),
                    term.factor,
                    mix,
                    heads,
                    front_op.frames[-1].module if front_op is not None and front_op.frames else None,
                )
            )
        return tuple(result)

    def _used(self, branch: Branch) -> tuple[str, ...]:
        used: dict[str, None] = {}
        for node in branch.nodes:
            op = self.graph.op(node)
            for source in () if op is None else op.inputs:
                name = self.graph.nodes[self.graph.canonical(source)].name
                if name is not None:
                    used[name] = None
        return tuple(used)

    def _steps(self) -> tuple[tuple[Step, ...], list[dict[int, str]]]:
        steps, values = [], []
        for index, diamond in enumerate(self.diamonds):
            rows = [i for i, (step, _) in enumerate(self.terms) if step == index]
            given = {self.terms[i][1].node: f"@write:{i}" for i in rows}
            given[diamond.start] = "@state"
            try:
                recorded, names = record(self.graph, self.states[index + 1], given)
            except NotReplayable as error:
                raise AnatomyError(
                    f"the sum in {diamond.carrier.frames[-1].module or 'the model'} goes through {error}, which does "
                    "not treat each token alone: the stream cannot be replayed there"
                ) from error
            values.append(names)
            steps.append(Step(tuple(rows), embedding.plain_additions(recorded), _scale(self.graph, diamond)))
        return tuple(steps), values

    def _state(self, index: int) -> State:
        node = self.states[index]
        made = self.graph.result_slot(node)
        point = None if made is None else Point(made[0].site, made[1])
        used = self._argument(self.diamonds[index].carrier, node) if index < len(self.diamonds) else None
        argument = self.graph.trace.arguments.get(node)
        if point is None and argument is None:
            raise AnatomyError(
                f"state {index} of the stream (shape {self.graph.nodes[node].shape}) is made inside compiled or fused "
                "code, where it cannot be seen again; use the uncompiled form of that module"
            )
        return State(used, point, argument)

    def _argument(self, op: Op, node: int) -> Point:
        slot = self.graph.argument_slot(op.call, node)
        if op.call is None or slot is None:
            where = op.frames[-1].module if op.frames else ""
            raise AnatomyError(
                f"the addition {op.name} in {where or 'the model'} is made inside compiled or fused code "
                f"({op.call.site.function if op.call else 'no Python call'}), where it cannot be seen again; use the "
                "uncompiled form of that module"
            )
        return Point(op.call.site, slot)


def _scale(graph: Graph, diamond: Diamond) -> float | str | None:
    """Return the factor on the skip: a number, or the name of its parameter."""
    op = diamond.carrier
    if base_name(op) not in ("mul", "div"):
        return None
    for plain in op.args:  # a number in the model's own code is no tensor
        if isinstance(plain, (int, float)):
            return 1.0 / plain if base_name(op) == "div" else float(plain)
    for position, source in enumerate(op.inputs):
        node = graph.nodes[graph.canonical(source)]
        if graph.canonical(source) == diamond.start:
            continue
        if node.name is not None:
            return node.name
        if node.value is not None and node.value.numel() == 1:
            number = float(node.value.item())
            return 1.0 / number if base_name(op) == "div" and position else number
    return None


def _followed(graph: Graph, streams: Sequence[Stream]) -> tuple[str, ...]:
    """Return the modules whose execution delimits the calls of each site: those with a site, and what they call."""
    points: list[Point | None] = []
    for stream in streams:
        points += [p.point for p in stream.parts]
        points += [s.write for s in stream.sublayers] + [s.value_mix for s in stream.sublayers]
        points += [s.used for s in stream.states] + [s.made for s in stream.states]
    sites = {p.site.module for p in points if p is not None}
    wanted = set(sites)
    for execution in graph.trace.executions:
        if execution.parent is not None and execution.parent.module in sites:
            wanted.add(execution.frame.module)
    return tuple(sorted(wanted))
