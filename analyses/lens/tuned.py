"""The tuned lens: an affine map for each state that carries it into the basis of the last one, before the head.

    translated = x + W x + b        W = 0, b = 0 is the logit lens

Three ways to find it, each better and dearer than the one before (Belrose et al. 2023; Din et al. 2023):
``bias``, the mean difference b = E[x_K - x]; ``ridge``, the least-squares map from x to x_K; ``kl``, gradient descent
on KL(final || lens) from there. Closed forms come from sums in float64 over one pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack

import numpy as np
import torch
from torch import Tensor, nn

from streamlens.analyses.lens.descent import Descent, descend
from streamlens.analyses.lens.head import LinearHead, head_of
from streamlens.analyses.lens.moments import StateMoments
from streamlens.analyses.lens.tally import LensOptions, LensTally
from streamlens.analyses.result import Result
from streamlens.analyses.sampling import some_rows
from streamlens.analyses.source import CaptureSource, Corpus, LiveSource, Origin, Source, source_of, watched
from streamlens.analyses.statistics import Floats
from streamlens.block import Block
from streamlens.calling import eager_math
from streamlens.checkpoint.model import Model
from streamlens.errors import FormatError, MissingDataError, UsageError
from streamlens.rest import resting

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Kind = Literal["bias", "ridge", "kl"]
KINDS: tuple[Kind, ...] = ("bias", "ridge", "kl")
FORMAT = "streamlens tuned lens 1"


@dataclass(frozen=True)
class TunedLens(Result):
    """Translators for all states of one stream of one model, and how much they help on documents not trained on."""

    title: str
    kind: Kind
    stream: str
    model_sha256: str
    labels: tuple[str, ...]
    """(state,)"""
    matrix: Tensor | None
    """(state - 1, d_model, d_model) float32 W of each state but the last; None for ``bias``."""
    bias: Tensor
    """(state - 1, d_model) float32."""
    kl_logit_lens: Floats
    """(state, 3) mean KL(final || lens) on the held-out documents without translators, and its 95 % interval; nats."""
    kl: Floats
    """(state, 3) the same with translators."""
    train_tokens: int
    held_out_tokens: int
    held_out_documents: int
    text_sha256: str = ""
    """sha256 of the tokens that it was made from, as captures record it; empty where that is not known."""
    held_out: tuple[int, ...] = ()
    """Numbers of the documents of that text that it was judged on; it was trained on all others."""

    def trained_on(self, source: Source) -> bool:
        """Whether a source shows the text that the lens was made from, or windows of it."""
        return bool(self.text_sha256) and text_sha256(source) == self.text_sha256

    def translate(self, k: int, state: Tensor) -> Tensor:
        """Return state x_k in the basis of the last one, (token, d_model); the last one is returned as it is."""
        if k == len(self.bias):
            return state
        wide = state.to(torch.float64 if state.dtype == torch.float64 else torch.float32)
        moved = wide + self.bias[k].to(wide)
        if self.matrix is not None:
            moved = moved + wide @ self.matrix[k].to(wide).t()
        return moved.to(state.dtype)

    def check(self, source: Source) -> None:
        """Make sure that this lens belongs to a source.

        Raises:
            UsageError: it was trained on another model or stream.
        """
        if source.model.sha256 != self.model_sha256:
            raise UsageError(
                f"this tuned lens belongs to the model with sha256 {self.model_sha256[:16]}, and {source.model.source} "
                f"has {source.model.sha256[:16]}: train one for it (train_lens, `streamlens lens --train ridge`)"
            )
        if source.stream.name != self.stream or len(source.stream.steps) != len(self.bias):
            raise UsageError(f"this tuned lens belongs to the stream {self.stream!r}, not {source.stream.name!r}")

    def save(self, path: str | Path) -> Path:
        """Write the lens itself (.pt, read by `load_lens`), or its figure or table, as the suffix says.

        Raises:
            UsageError: another suffix.
        """
        path = Path(path)
        if path.suffix != ".pt":
            return super().save(path)
        content = {field.name: getattr(self, field.name) for field in fields(self)}
        content |= {name: torch.from_numpy(content[name]) for name in ("kl_logit_lens", "kl")}
        torch.save({"format": FORMAT, **content, "labels": list(self.labels), "held_out": list(self.held_out)}, path)
        return path

    def rows(self) -> list[dict[str, Any]]:
        """Return one row for each state."""
        return [
            {
                "state": k,
                "label": label,
                "kl_logit_lens": float(self.kl_logit_lens[k, 0]),
                "kl": float(self.kl[k, 0]),
                "kl_low": float(self.kl[k, 1]),
                "kl_high": float(self.kl[k, 2]),
                "kl_drop": float(self.kl_logit_lens[k, 0] - self.kl[k, 0]),
            }
            for k, label in enumerate(self.labels)
        ]

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the held-out divergence with and without translators."""
        from streamlens.analyses.lens.drawing import plot_tuned

        return plot_tuned(self, ax)


def load_lens(path: str | Path) -> TunedLens:
    """Read a tuned lens that was saved. Nothing in the file can run as code.

    Raises:
        UsageError: there is no such file.
        FormatError: it is not a tuned lens.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path} is not there: train a lens and save it first (`streamlens lens --train ridge`)")
    try:
        content = torch.load(path, weights_only=True, map_location="cpu")
        if content.pop("format") != FORMAT:
            raise FormatError(f"{path} is a tuned lens of another version")
        content["labels"] = tuple(content["labels"])
        content["held_out"] = tuple(content.get("held_out", ()))
        content |= {name: content[name].numpy() for name in ("kl_logit_lens", "kl")}
        return TunedLens(**content)
    except FormatError:
        raise
    except Exception as error:
        raise FormatError(f"{path} is not a tuned lens that streamlens saved ({type(error).__name__})") from error


@resting
def train_lens(
    origin: Origin,
    *,
    kind: Kind = "ridge",
    stream: str | None = None,
    model: Model | nn.Module | None = None,
    progress: bool = True,
    ridge: float = 0.01,
    held_out: float = 0.2,
    steps: int = 250,
    step_tokens: int = 256,
    learning_rate: float = 1e-3,
    dtype: str | torch.dtype | None = None,
    start: Literal["zero", "bias", "ridge"] = "ridge",
    split_seed: int = 0,
    **corpus: Unpack[Corpus],
) -> TunedLens:
    """Learn a translator for each state of a stream.

    Args:
        origin: a capture or its path, a model, module or its path.
        kind: ``bias``, ``ridge`` or ``kl``.
        stream: which stream; by default the one that the head reads.
        model: for a capture: its model, where it is loaded already.
        progress: whether to show a bar.
        ridge: penalty on W, relative to the median variance of the dimensions of a state.
        held_out: share of the documents on which the lens is judged, and not trained.
        steps: of gradient descent (Adam, weight decay 1e-3 towards the logit lens, rate falling to 0), for ``kl``.
        step_tokens: tokens in each step.
        learning_rate: of the first step.
        dtype: of the products with the unembedding, as in `logit_lens`.
        start: where ``kl`` begins. A state that it makes worse on the training tokens keeps what it began with.
        split_seed: draws the documents that are held out, and the tokens of each step.
        **corpus: for a live model: what it is shown, as in `streamlens.capture`.

    Raises:
        UsageError: an unknown kind, or fewer than two documents.
        MissingDataError: a head that cannot be taken apart.

    >>> from fixtures import zoo
    >>> ids = torch.arange(60).reshape(5, 12)
    >>> lens = train_lens(zoo.build("gpt2").module, kind="bias", tokens=ids, progress=False)
    >>> lens.bias.shape, lens.held_out_documents
    (torch.Size([6, 32]), 1)
    """
    from streamlens.analyses.lens.door import precision_named

    if kind not in KINDS or start not in ("zero", "bias", "ridge"):
        raise UsageError(f"a tuned lens is of one kind of {', '.join(KINDS)}, and starts at zero, bias or ridge")
    source = source_of(origin, stream=stream, model=model, **corpus)
    apart = _split(source, held_out, split_seed)
    with eager_math():
        trainer = _Trainer(source, apart, progress)
        closed = kind if kind != "kl" else start
        matrix, bias = trainer.closed_form(closed, ridge)
        if kind == "kl":
            settings = Descent(steps, step_tokens, learning_rate, precision_named(dtype), split_seed)
            matrix, bias = trainer.descended(matrix, bias, settings)
        return trainer.judged(kind, matrix, bias)


class _Trainer:
    def __init__(self, source: Source, apart: Tensor, progress: bool) -> None:
        self.source, self.apart, self.progress = source, apart, progress
        self.train_tokens = 0
        with torch.no_grad():
            head = head_of(source, next(source.blocks()))
        if not isinstance(head, LinearHead):
            raise MissingDataError(f"no lens can be tuned to a head that cannot be taken apart: {head.description}")
        self.head = head

    def blocks(self, label: str, *, train: bool) -> Iterator[Block]:
        """Yield the documents to train on, or those held out."""
        for block in watched(self.source, label, progress=self.progress):
            mine = torch.isin(block.doc, self.apart.to(block.doc.dtype)) != train
            rows = torch.nonzero(mine)[:, 0]
            if len(rows):
                yield some_rows(block, rows, block.start)

    def closed_form(self, kind: str, ridge: float) -> tuple[Tensor | None, Tensor]:
        steps, width = len(self.source.stream.steps), self.source.stream.d_model
        if kind == "zero":
            return None, torch.zeros(steps, width)
        sums = StateMoments(steps, width, second=kind == "ridge")
        with torch.no_grad():
            for block in self.blocks(f"lens {kind}", train=True):
                sums.update(block)
        self.train_tokens = sums.count
        return sums.ridge(ridge) if kind == "ridge" else (None, sums.bias())

    def descended(self, matrix: Tensor | None, bias: Tensor, settings: Descent) -> tuple[Tensor, Tensor]:
        head = self.head if settings.dtype is None else self.head.to(settings.dtype)
        found, self.train_tokens = descend(head, lambda: self.blocks("lens kl", train=True), matrix, bias, settings)
        return found

    def judged(self, kind: Kind, matrix: Tensor | None, bias: Tensor) -> TunedLens:
        source, count = self.source, len(self.source.stream.steps) + 1
        nothing = np.zeros((count, 3))
        lens = TunedLens(
            title=f"tuned lens ({kind}): {source.description}",
            kind=kind,
            stream=source.stream.name,
            model_sha256=source.model.sha256,
            labels=source.stream.state_labels,
            matrix=matrix,
            bias=bias,
            kl_logit_lens=nothing,
            kl=nothing,
            train_tokens=self.train_tokens,
            held_out_tokens=0,
            held_out_documents=len(self.apart),
            text_sha256=text_sha256(source),
            held_out=tuple(sorted(self.apart.tolist())),
        )
        options = LensOptions(tuple(range(count)), (1,), None, False, None, None, ())
        tallies = [LensTally(source, self.head, options, each) for each in (None, lens)]
        with torch.no_grad():
            for block in self.blocks("lens, held out", train=False):
                for tally in tallies:
                    tally.update(block)
        plain, tuned = (np.stack([s.mean, s.low, s.high], 1) for s in (t.summaries()["kl"] for t in tallies))
        values = {field.name: getattr(lens, field.name) for field in fields(lens)}
        return TunedLens(**{**values, "kl_logit_lens": plain, "kl": tuned, "held_out_tokens": tallies[0].tokens})


def text_sha256(source: Source) -> str:
    """Return the sha256 of the tokens of a source, or of those that it is a sample of; empty where it is not known."""
    known: Any = source
    while not isinstance(known, CaptureSource | LiveSource):
        if not hasattr(known, "source"):
            return ""
        known = known.source
    return str(known.capture.attrs["text_sha256"]) if isinstance(known, CaptureSource) else known.plan.feed.sha256


def _split(source: Source, share: float, seed: int) -> Tensor:
    """Return the numbers of the documents that are held out."""
    if isinstance(source, CaptureSource):
        docs = np.unique(source.capture.tokens.doc.numpy())
    elif isinstance(source, LiveSource):
        docs = np.unique(source.plan.feed.doc)
    else:
        docs = np.unique(np.concatenate([block.doc.numpy() for block in source.blocks()]))
    if len(docs) < 2:
        raise UsageError(
            "a tuned lens is judged on documents that it was not trained on, and there is one document only: give "
            "several (text=[...], --text twice, --jsonl)"
        )
    if not 0 < share < 1:
        raise UsageError(f"held_out is a share of the documents between 0 and 1, not {share}")
    count = min(len(docs) - 1, max(1, round(share * len(docs))))
    return torch.from_numpy(np.random.default_rng(seed).permutation(docs)[:count].copy())
