"""The anatomy drawn as the stream itself: a line from the embedding to the head, and every sublayer a branch of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape

from streamlens.anatomy import Anatomy, Stream

_LEFT, _RIGHT, _MIDDLE, _REACH = 140.0, 160.0, 118.0, 84.0
_WIDE = 1040.0
"""What a page holds; a stream of many steps is wider."""
_WIDEST, _NARROWEST = 9.0, 1.2


@dataclass(frozen=True)
class Branch:
    """What is shown of one sublayer."""

    amount: float
    """What the width of its branch is proportional to, up to 1: a single larger one would make all others thin."""
    caption: str
    """What appears when it is pointed at."""


def draw_stream(anatomy: Anatomy, stream: Stream, branches: Mapping[str, Branch]) -> str:
    """Return the stream as SVG, from left to right.

    Args:
        anatomy: the whole anatomy, for the head.
        stream: what to draw.
        branches: by label of a sublayer.

    >>> import torch
    >>> from fixtures import zoo
    >>> from streamlens.discovery.streams import discover
    >>> anatomy = discover(zoo.build("gpt2").module, torch.arange(8)[None])
    >>> drawn = draw_stream(anatomy, anatomy.stream(), {})
    >>> drawn.count("<path class='branch") == len(anatomy.stream().sublayers)
    True
    """
    count = len(stream.steps)
    pace = max(11.5, min(52.0, (_WIDE - _LEFT - _RIGHT) / count))
    width = _LEFT + pace * count + _RIGHT
    x = [_LEFT + pace * k for k in range(count + 1)]
    pieces = [
        f"<svg class='stream' width='{width:.0f}' height='236' viewBox='0 0 {width:.0f} 236' role='img' "
        f"aria-label='The residual stream {escape(stream.name)}: {count} steps from the embedding to the head'>",
        f"<line x1='{_LEFT - 24:.1f}' x2='{x[-1] + 24:.1f}' y1='{_MIDDLE}' y2='{_MIDDLE}' stroke='currentColor' "
        "stroke-width='3'/>",
    ]
    for index, step in enumerate(stream.steps):
        for s in step.sublayers:
            sublayer = stream.sublayers[s]
            branch = branches.get(sublayer.label, Branch(0.0, sublayer.label))
            up = -1.0 if sublayer.kind in ("attn", "cross_attn", "mixer") else 1.0
            bend = _MIDDLE + up * _REACH
            thick = _NARROWEST + (_WIDEST - _NARROWEST) * min(1.0, max(0.0, branch.amount))
            start, end = x[sublayer.read] + 2, x[index + 1] - 2
            pieces.append(
                f"<path class='branch {sublayer.kind}' stroke-width='{thick:.1f}' "
                f"d='M{start:.1f} {_MIDDLE}C{start:.1f} {bend:.1f} {end:.1f} {bend:.1f} {end:.1f} {_MIDDLE}'>"
                f"<title>{escape(branch.caption)}</title></path>"
            )
    passed = {n.state for n in stream.norms if n.state is not None}
    pieces += [_state(k, at, normed=k in passed) for k, at in enumerate(x)]
    pieces += _layers(stream, x)
    pieces += _ends(anatomy, stream, x[-1])
    return "".join([*pieces, "</svg>"])


def _state(k: int, at: float, *, normed: bool) -> str:
    """A dot for a state, or a diamond where it comes out of a norm on the stream itself."""
    turned = f"x='{at - 3.5:.1f}' y='{_MIDDLE - 3.5}' width='7' height='7' transform='rotate(45 {at:.1f} {_MIDDLE})'"
    tag, place = ("rect", turned) if normed else ("circle", f"cx='{at:.1f}' cy='{_MIDDLE}' r='2.6'")
    name = f"a norm, then state x_{k}" if normed else f"state x_{k}"
    return f"<{tag} {place} fill='currentColor'><title>{name}</title></{tag}>"


def _layers(stream: Stream, x: list[float]) -> list[str]:
    """Number the layers below their branches, so many that the numbers do not touch."""
    firsts = dict(enumerate(stream.layer_states[:-1]))
    lasts = {layer: max(s.read for s in stream.sublayers if s.layer == layer) + 1 for layer in range(stream.layers)}
    narrow = min(x[lasts[k]] - x[firsts[k]] for k in firsts)
    every = 1 if narrow >= 24 else 2 if narrow >= 12 else 5
    return [
        f"<text x='{(x[firsts[k]] + x[lasts[k]]) / 2:.1f}' y='214' text-anchor='middle' font-size='12' "
        f"fill='currentColor'>{k}</text>"
        for k in firsts
        if k % every == 0
    ] + [f"<text x='{x[0] - 12:.1f}' y='214' text-anchor='end' font-size='12' fill='currentColor'>layer</text>"]


def _ends(anatomy: Anatomy, stream: Stream, last: float) -> list[str]:
    texts = []
    for row, part in enumerate(stream.parts):
        y = _MIDDLE + 4 + 18 * (row - (len(stream.parts) - 1) / 2)
        texts.append(
            f"<text x='{_LEFT - 32:.1f}' y='{y:.1f}' text-anchor='end' font-size='13' fill='currentColor'>"
            f"{'+ ' if row else ''}{escape(part.label)}</text>"
        )
    lines = ["no head"] if anatomy.head.stream != stream.name else _head_lines(anatomy, stream)
    for row, line in enumerate(lines):
        y = _MIDDLE + 4 + 18 * (row - (len(lines) - 1) / 2)
        texts.append(f"<text x='{last + 32:.1f}' y='{y:.1f}' font-size='13' fill='currentColor'>{escape(line)}</text>")
    return texts


def _head_lines(anatomy: Anatomy, stream: Stream) -> list[str]:
    final = [n.form.replace("_norm", " norm") for n in stream.norms if n.state is None]
    logits = "model output" if anatomy.head.vocab is None else f"{anatomy.head.vocab:,} logits"
    return [*final, logits]
