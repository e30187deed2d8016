"""`report`: one self-contained page about one capture."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from torch import nn

from streamlens.analyses.lens.grid import shown
from streamlens.analyses.lens.tracks import TokenTracks, token_tracks
from streamlens.analyses.report.content import Section
from streamlens.analyses.report.sections import SECTIONS, Look
from streamlens.analyses.source import CaptureSource, Origin, source_of
from streamlens.checkpoint.model import Model
from streamlens.errors import MissingDataError, UsageError
from streamlens.reader.citing import citation
from streamlens.reader.opening import Capture, Proof
from streamlens.rest import resting
from streamlens.wording import counted

LEAST, MOST, WORK = 1024, 16_384, 1.4e11
"""Tokens for what runs the model: so many that tokens times parameters come to `WORK`, within these bounds."""

_WORD = 24


@resting
def report(
    origin: Origin,
    out: str | Path | None = None,
    *,
    model: Model | nn.Module | None = None,
    against: Origin | None = None,
    sections: Sequence[str] | None = None,
    tokens: int | None = None,
    positions: Sequence[int] = range(40),
    doc: int | None = None,
    progress: bool = True,
    tell: Callable[[str], None] = lambda text: None,
) -> Path:
    """Run the analyses on a capture and write one HTML page that needs nothing else.

    Args:
        origin: a capture or its path.
        out: the page; by default beside the capture, ``<capture>.html``.
        model: the capture's model, where it is loaded already.
        against: another capture, for the section that compares both.
        sections: which of `SECTIONS`, in the order of the page; by default all that there is something to say to.
        tokens: for the lens and the ablation: about how many tokens, in windows spread over the text; by default
            fewer for larger models.
        positions: positions of the interactive lens grid.
        doc: document of the grid; by default the first.
        progress: whether to show a bar for each analysis.
        tell: what is told about sections that cannot be made.

    Returns:
        The path of the page.

    Raises:
        UsageError: a section that is not there; a model instead of a capture of it.
    """
    asked = _asked(sections, compares=against is not None)
    source = _capture_of(origin, model=model)
    other = None if against is None else _capture_of(against, stream=source.name)
    opened = source.capture
    path = Path(out) if out is not None else opened.path.with_suffix(".html")
    tracks = None
    if "lens" in asked:
        try:
            tracks = token_tracks(source, positions=positions, doc=doc)
        except MissingDataError as reason:
            tell(f"lens grid: {reason}")
    look = Look(source, tokens or _affordable(source), tracks, progress, other)
    left_out: list[str] = []

    def note(reason: str) -> None:
        left_out.append(reason)
        tell(reason)

    made = [_made(name, look, note) for name in asked]
    text = render(opened, [section for section in made if section is not None], tracks, left_out=left_out)
    partial = path.with_name(path.name + ".part")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
    return path


def _capture_of(origin: Origin, **named: Any) -> CaptureSource:
    source = source_of(origin, **named)
    if not isinstance(source, CaptureSource):
        raise UsageError("a report is about a capture, which holds the proof: run `streamlens capture` first")
    return source


def _asked(sections: Sequence[str] | None, *, compares: bool) -> list[str]:
    """Return the sections to make, in the order of the page."""
    if sections is None:
        return [name for name in SECTIONS if compares or name != "comparison"]
    if unknown := [name for name in sections if name not in SECTIONS]:
        raise UsageError(f"there is no section {unknown[0]!r}; there are {', '.join(SECTIONS)}")
    if compares != ("comparison" in sections):
        raise UsageError("the section comparison and the capture to compare with (against, --against) need each other")
    return [name for name in SECTIONS if name in sections]


def _affordable(source: CaptureSource) -> int:
    try:
        size = sum(parameter.numel() for parameter in source.model.module.parameters())
    except MissingDataError:
        return LEAST  # the sections that need the model will say so
    return int(min(MOST, max(LEAST, WORK / max(1, size))))


def _made(name: str, look: Look, tell: Callable[[str], None]) -> Section | None:
    """Return a section, or None where the capture lacks what it needs."""
    try:
        return SECTIONS[name](look)
    except MissingDataError as reason:
        tell(f"no section {name}: {reason}")
        return None


def render(
    capture: Capture, sections: Sequence[Section], tracks: TokenTracks | None, *, left_out: Sequence[str] = ()
) -> str:
    """Return the page.

    Args:
        capture: what it is about.
        sections: what stands on it.
        tracks: the data of the interactive lens grid, if a section has one.
        left_out: which sections are not there, and why.
    """
    package = "streamlens.analyses.report"
    assets = files(package) / "assets"
    environment = Environment(
        loader=PackageLoader(package, "assets"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    attrs, shows_grid = capture.attrs, any(section.grid for section in sections)
    return environment.get_template("page.html.j2").render(
        version=version("residual-streamlens"),
        title=Path(str(attrs["model_source"])).name,
        summary=_summary(capture),
        facts=_facts(capture),
        proof=_proof(capture.proof),
        sections=sections,
        left_out=left_out,
        citation=citation(capture),
        tracks=payload(tracks, causal=bool(attrs["causal"])) if tracks is not None and shows_grid else "",
        css=(assets / "page.css").read_text("utf-8"),
        script=(assets / "page.js").read_text("utf-8"),
    )


def payload(tracks: TokenTracks, *, causal: bool) -> str:
    """Return what the page's script reads, as JSON that is safe inside a script element."""
    rank = [[None if np.isnan(v) else int(v) for v in row] for row in tracks.target_rank]
    data: dict[str, Any] = {
        "labels": tracks.labels,
        "causal": causal,
        "position": tracks.position.tolist(),
        "read": tracks.ids.tolist(),
        "target": tracks.targets.tolist(),
        "kl": _short(tracks.kl, 3),
        "entropy": _short(tracks.entropy, 3),
        "rank": rank,
        "top": tracks.top.tolist(),
        "probability": _short(tracks.top_probability, 4),
        "followed": [tokens.tolist() for tokens in tracks.followed],
        "tracks": [
            {"rank": r.tolist(), "probability": _short(p, 5)}
            for r, p in zip(tracks.rank, tracks.probability, strict=True)
        ],
        "text": {str(token): shown(text, _WORD) for token, text in tracks.text.items()},
    }
    # "</script>" inside a token would end the element.
    return json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")


def _short(values: np.ndarray[Any, Any], digits: int) -> Any:
    """Round for the page: the tables beside it have all digits."""
    return np.round(values, digits).tolist()


def _summary(capture: Capture) -> str:
    stream = capture.stream().anatomy
    return (
        f"A residual stream of width {stream.d_model} through {stream.layers} layers, "
        f"{len(stream.sublayers)} sublayers, seen on {capture.n_tokens:,} tokens."
    )


def _facts(capture: Capture) -> list[tuple[str, str]]:
    attrs = capture.attrs
    return [
        ("model", f"{attrs['model_source']} (sha256 {str(attrs['model_sha256'])[:16]})"),
        ("text", str(attrs["text"])),
        ("tokens", f"{capture.n_tokens:,}"),
        ("dtype, device", f"{attrs['dtype']}, {attrs.get('device', 'cpu')}"),
    ]


def _proof(proof: Proof) -> dict[str, str]:
    if proof.exact:
        return {
            "verdict": "exact",
            "headline": "Proved: the writes add up to the model's own states, bit for bit, in every block of tokens "
            f"({counted(proof.blocks, 'block')}).",
            "explanation": "Every block was replayed from the embedding parts and the writes alone, in the model's own "
            "order and arithmetic, and every state compared with the one that the model computed.",
        }
    return {
        "verdict": "close",
        "headline": str(proof)[0].upper() + str(proof)[1:] + ".",
        "explanation": "Where the replay is not equal to the last bit, the relative error of each state decides, "
        "against two roundings of its dtype.",
    }
