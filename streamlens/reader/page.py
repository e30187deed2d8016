"""A capture as a notebook shows it: plain HTML, no scripts, nothing fetched."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from streamlens.reader.stream import StreamView
from streamlens.store.layout import dtype_name
from streamlens.wording import human_bytes

if TYPE_CHECKING:
    from streamlens.reader.opening import Capture

_GOOD, _FAIR, _BAD = "#1b7f4d", "#9a6700", "#b42318"
_CELL = 'style="text-align:left;padding:1px 12px 1px 0"'


def to_html(capture: Capture) -> str:
    """Return a summary: what the file is, whether its writes add up, and a table of each stream's sublayers."""
    attrs, proof = capture.attrs, capture.proof
    colour = _BAD if not capture.complete else _GOOD if proof.exact else _FAIR
    facts = {
        "model": f"{attrs.get('model_source', '')} {str(attrs.get('model_sha256', ''))[:12]}",
        "tokens": f"{capture.n_tokens:,} in {proof.blocks} blocks",
        "text": str(attrs.get("text", "")),
        "size": human_bytes(capture.n_bytes),
        "written by": f"streamlens {attrs.get('streamlens_version', '?')}, torch {attrs.get('torch_version', '?')}",
    }
    rows = "".join(f"<tr><th {_CELL}>{name}</th><td {_CELL}>{escape(text)}</td></tr>" for name, text in facts.items())
    verdict = f'<p style="color:{colour};margin:4px 0"><b>proof</b> {escape(str(proof))}</p>'
    streams = "".join(_stream(view) for view in capture.streams.values())
    title = f'<p style="margin:4px 0"><b>Capture</b> <code>{escape(str(capture.path))}</code></p>'
    return f"<div>{title}{verdict}<table>{rows}</table>{streams}</div>"


def _stream(view: StreamView) -> str:
    stream = view.anatomy
    parts = " + ".join(part.label for part in stream.parts)
    summary = (
        f"stream <b>{escape(view.name)}</b>: {escape(parts)} + {len(stream.sublayers)} writes in {stream.layers} "
        f"layers, d_model {stream.d_model}, {dtype_name(view.dtype)}{', compact' if view.compact else ''}"
    )
    names = ("index", "layer", "kind", "label", "reads state", "norm", "module", "stored")
    head = "".join(f"<th {_CELL}>{name}</th>" for name in names)
    body = ""
    for s in stream.sublayers:
        held = "yes" if s.index in view.stored else "no"
        cells = (s.index, s.layer, s.kind, s.label, s.read, s.norm, s.module, held)
        body += "<tr>" + "".join(f"<td {_CELL}>{escape(str(cell))}</td>" for cell in cells) + "</tr>"
    return f"<details><summary>{summary}</summary><table><tr>{head}</tr>{body}</table></details>"
