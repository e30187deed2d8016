"""`compare`: two captures side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from streamlens.analyses.compare.aligning import align
from streamlens.analyses.compare.answer import Comparison, MovedResult, Similarity, column_of
from streamlens.analyses.compare.folding import Moved, Side, StateSample, differences, same_tokens, together
from streamlens.analyses.position.geometry import debiased_cka
from streamlens.analyses.sampling import spread
from streamlens.analyses.source import CaptureSource, Origin, source_of, watched
from streamlens.analyses.statistics import Unit
from streamlens.anatomy import Stream
from streamlens.errors import MissingDataError, UsageError
from streamlens.progress import Progress

_SAME, _OTHER = (
    "both saw the same tokens: differences are paired",
    "they did not see the same tokens: a difference is one of model and tokens together, and its interval unpaired",
)


def compare(
    first: Origin,
    second: Origin,
    *,
    measure: str = "relative_write",
    stream: str | None = None,
    sample: int = 512,
    progress: bool = True,
) -> Comparison:
    """Set two captures side by side: pre-norm and post-norm, before and after training, one seed and another.

    Args:
        first: a capture or its path.
        second: another one; differences are second less first.
        measure: which one is drawn; all are in the table.
        stream: which stream of both; by default the one that the head reads.
        sample: tokens, spread over the text, on which states are compared as wholes (CKA); none at position 0.
        progress: show a progress bar.

    Returns:
        One row for each pair of sublayers (or layers, embedding parts, biases) and measure, with the difference and
        its 95 % interval; the losses, where both captures keep them; where both saw the same tokens, how alike their
        layers are and, where they have the same shape, how far each state and each write has moved.

    Raises:
        MissingDataError: a narrowed capture, which lacks some of the writes; one under way; one of position 0 alone.
        UsageError: something else than a capture; no such measure.

    Example:
        >>> import pathlib, tempfile
        >>> import streamlens as sl
        >>> from fixtures import witnesses
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> for name in ("pre_norm", "post_norm"):
        ...     _ = sl.capture(witnesses.model(name), out=folder / f"{name}.h5", max_tokens=512, progress=False)
        >>> found = sl.compare(folder / "pre_norm.h5", folder / "post_norm.h5", progress=False)
        >>> found.paired, found.at("3_mlp_out", "relative_write")["difference"] > 0
        (True, True)
    """
    column_of(measure)
    sources = _capture_of(first, stream), _capture_of(second, stream)
    streams = sources[0].stream, sources[1].stream
    paired = same_tokens(*sources)
    sides = Side(sources[0], seed=0), Side(sources[1], seed=int(not paired))
    names = _names(*(source.capture.path for source in sources))
    layers = _layers_side_by_side(*streams)
    # One state at position 0 can be as large as all others together.
    later = np.flatnonzero(sources[0].capture.tokens.position.numpy() > 0)
    if not len(later):
        raise MissingDataError(f"{sources[0].capture.path} has position 0 alone, which is left out of every mean")
    chosen = later[spread(len(later), sample)]
    samples = [
        StateSample(states, own.d_model, chosen) for states, own in zip(zip(*layers, strict=True), streams, strict=True)
    ]
    for index, source in enumerate(sources):
        for block in watched(source, ("first", "second")[index], progress=progress):
            sides[index].update(block)
            if paired:
                samples[index].update(block)
    rows = sides[0].norms.contributions, sides[1].norms.contributions
    alignment = align(*rows, (streams[0].layers, streams[1].layers))
    comparable = paired and _shape(streams[0]) == _shape(streams[1])
    return Comparison(
        title=f"{names[1]} against {names[0]}",
        names=names,
        measure=measure,
        paired=paired,
        says=(f"sublayers are {alignment.says}", _SAME if paired else _OTHER),
        over=_units(*(side.sums.unit for side in sides)),
        pairs=tuple((rows[0][i], rows[1][j]) for i, j in alignment.pairs),
        measures=differences(sides[0].sums, sides[1].sums, alignment.pairs),
        loss=_losses(*sides, sources),
        similarity=_similarity(samples, streams, layers, names) if paired else None,
        moved=_moved(sources, names, progress) if comparable else None,
    )


def _capture_of(origin: Origin, stream: str | None) -> CaptureSource:
    source = source_of(origin, stream=stream)
    if not isinstance(source, CaptureSource):
        raise UsageError("only captures are compared: run `streamlens capture` on each model first")
    if not source.capture.complete:
        raise MissingDataError(f"{source.capture.path} is under way: type its command again to finish it")
    return source


def _names(first: Path, second: Path) -> tuple[str, str]:
    """File names, with as many folders as it takes to tell them apart."""
    parts = first.absolute().parts, second.absolute().parts
    for count in range(1, max(map(len, parts)) + 1):
        names = "/".join(parts[0][-count:]), "/".join(parts[1][-count:])
        if names[0] != names[1]:
            return names
    return first.name, second.name  # a capture against itself


def _shape(stream: Stream) -> tuple[int, tuple[str, ...], tuple[str, ...]]:
    """What two streams must share for their vectors to be subtracted."""
    return stream.d_model, stream.labels, stream.state_labels


def _layers_side_by_side(first: Stream, second: Stream) -> list[tuple[int, int]]:
    """The states before each layer and after the last, of the first stream and at the same depth of the second."""
    ends = first.layer_states, second.layer_states
    return [(ends[0][layer], ends[1][layer * second.layers // first.layers]) for layer in range(first.layers + 1)]


def _losses(first: Side, second: Side, sources: tuple[CaptureSource, CaptureSource]) -> dict[str, float] | None:
    """Nats per token, where a token is the same thing to both."""
    tokenizers = {str(source.capture.attrs.get("tokenizer_sha256", "")) for source in sources}
    comparable = first.tells_loss and second.tells_loss and len(tokenizers) == 1
    return differences(first.loss, second.loss).at() if comparable else None


def _units(first: Unit, second: Unit) -> str:
    return f"{first}s" if first == second else f"{first}s of the first and {second}s of the second"


def _similarity(
    samples: Sequence[StateSample],
    streams: tuple[Stream, Stream],
    layers: Sequence[tuple[int, int]],
    names: tuple[str, str],
) -> Similarity:
    tables = zip(samples[0].tables, samples[1].tables, strict=True)
    return Similarity(
        title=f"Likeness of states: {names[1]} and {names[0]}",
        states=tuple(layers),
        labels=tuple((streams[0].state_labels[i], streams[1].state_labels[j]) for i, j in layers),
        cka=torch.tensor([debiased_cka(*pair) for pair in tables], dtype=torch.float64).numpy(),
        tokens=samples[0].tables.shape[1],
    )


def _moved(sources: tuple[CaptureSource, CaptureSource], names: tuple[str, str], progress: bool) -> MovedResult:
    stream = sources[0].stream
    moved = Moved(len(stream.state_labels), len(stream.labels))
    with Progress(sources[0].n_tokens, "both", enabled=progress) as bar:
        for first, second in together(sources[0].blocks(), sources[1].blocks()):
            moved.update(first, second)
            bar.update(first.stop - first.start)
    low, high = moved.sums.intervals()
    return MovedResult(
        title=f"How far {names[1]} is from {names[0]}",
        labels=(*stream.state_labels, *stream.labels),
        kinds=(*("state" for _ in stream.state_labels), *(s.kind for s in stream.sublayers)),
        at=(*range(len(stream.state_labels)), *(s.read for s in stream.sublayers)),
        mean=moved.sums.mean,
        low=low,
        high=high,
        unit=moved.sums.unit,
    )
