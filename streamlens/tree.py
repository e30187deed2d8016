"""The anatomy of a model as a tree that people read."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from streamlens.anatomy import Anatomy, Norm, Stream, Sublayer
from streamlens.wording import counted

_PLACES = {
    "pre": "norm before the branch",
    "post": "norm after the addition",
    "sandwich": "norms before and after the branch",
    "output": "norm on the branch's output",
    "none": "no norm",
}


def draw(anatomy: Anatomy) -> str:
    """Return the streams, their sublayers and the head, one line each; equal layers are folded.

    Example:
        >>> import torch
        >>> from streamlens.discovery.streams import discover
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
        >>> print(draw(discover(model, torch.randn(2, 5, 8))))
        main: d_model 8, 2 layers, 4 sublayers
        ├─ x_0 = embed
        ├─ layers 0 to 1: norm after the addition
        │    attn  layers.*.self_attn  (2 heads)
        │    mlp   layers.*
        └─ x_4
    """
    return "\n".join(line for stream in anatomy.streams for line in _stream(anatomy, stream))


def _stream(anatomy: Anatomy, stream: Stream) -> Iterator[str]:
    layout = ", laid out (position, doc)" if stream.position_first else ""
    yield f"{stream.name}: {stream.size}{layout}"
    embedded = [n for n in stream.norms if n.label == "embed"]
    around = f", then {_norm(embedded[0])}" if embedded else ""
    yield f"├─ x_0 = {' + '.join(p.label for p in stream.parts)}{around}"
    layers = [(layer, tuple(rows)) for layer, rows in groupby(stream.sublayers, key=lambda s: s.layer)]
    for _, group in groupby(layers, key=lambda item: _shape(stream, item[1])):
        alike = list(group)
        yield from _layers(stream, [layer for layer, _ in alike], alike[0][1], len(alike) > 1)
    final = [n for n in stream.norms if n.label == "final"]
    ending = f" -> {_norm(final[0])}" if final else ""
    if anatomy.head.stream == stream.name and anatomy.head.vocab is not None:
        ending += f" -> head ({anatomy.head.modules[-1]}), {counted(anatomy.head.vocab, 'logit')}"
    yield f"└─ x_{len(stream.steps)}{ending}"


def _layers(stream: Stream, layers: list[int], rows: tuple[Sublayer, ...], folded: bool) -> Iterator[str]:
    span = f"layers {layers[0]} to {layers[-1]}" if folded else f"layer {layers[0]}"
    parallel = ", in parallel" if len({s.read for s in rows}) < len(rows) else ""
    scaled = [stream.steps[s.read].scale for s in rows if stream.steps[s.read].scale is not None]
    skip = f", skip times {scaled[0]}" if scaled else ""
    yield f"├─ {span}: {_PLACES[rows[0].norm]}{parallel}{skip}"
    width = max(len(s.kind) for s in rows)
    for sublayer in rows:
        path = _generic(sublayer) if folded else sublayer.module
        heads = f"  ({counted(sublayer.heads, 'head')})" if sublayer.heads else ""
        yield f"│    {sublayer.kind:<{width}}  {path or 'the model itself'}{heads}"


def _shape(stream: Stream, rows: tuple[Sublayer, ...]) -> tuple[object, ...]:
    first = rows[0].read
    return tuple(
        (s.kind, s.norm, s.heads, _generic(s), s.read - first, stream.steps[s.read].scale is None) for s in rows
    )


def _generic(sublayer: Sublayer) -> str:
    return ".".join("*" if piece.isdigit() else piece for piece in sublayer.module.split("."))


def _norm(norm: Norm) -> str:
    return "LayerNorm" if norm.form == "layer_norm" else "RMSNorm"
