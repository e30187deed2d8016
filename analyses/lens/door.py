"""The logit lens: what the model would say if it stopped at each state of the residual stream.

At every state x_k, the whole head of the model is applied: the final norm, recomputed on x_k, the unembedding, bias,
scale and soft-cap (nostalgebraist 2020). What comes out is a distribution over the vocabulary; it is compared with the
final one and with the token that came. What each write adds to the logits, with the final norm held fixed, is another
question, which `write_lens` answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from streamlens.analyses.lens.affine import AffineMatch
from streamlens.analyses.lens.grid import LensGrid
from streamlens.analyses.lens.head import NEAREST, head_of
from streamlens.analyses.lens.tally import LensOptions, LensTally, Summary, Translators
from streamlens.analyses.result import Result
from streamlens.analyses.source import Corpus, Origin, Source, source_of, watched
from streamlens.analyses.statistics import Unit
from streamlens.calling import eager_math
from streamlens.checkpoint.model import Model
from streamlens.errors import UsageError
from streamlens.rest import resting

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from streamlens.analyses.lens.tuned import TunedLens

DEFAULT_TOP_K = (1, 5, 10)


@dataclass(frozen=True)
class LensResult(Result):
    """What the lens shows at each state: means over tokens but the first of each document, in nats where they are."""

    title: str
    head: str
    """What the states were looked at through: the model's own head, or its word embeddings in place of one."""
    head_error: float
    """How far the head as it is applied here is from the model's own, relative to the largest logit, on a probe."""
    states: NDArray[np.int64]
    """(state,) index k of each x_k."""
    labels: tuple[str, ...]
    """(state,) ``x_0``, then what was written last."""
    kinds: tuple[str, ...]
    """(state,) ``embed``, then the kind of what was written last."""
    metrics: Mapping[str, Summary]
    """By name, each over (state,): ``kl`` of the final distribution from that of the lens, ``entropy`` of the lens,
    ``cross_entropy`` to the target (all in nats), ``target_rank`` and ``top1_rank`` of the target and of the final
    favourite (0 is the likeliest), ``top_probability``, ``overlap_K`` for each K, ``jsd`` if asked for."""
    delta_log_probability: Summary
    """(state - 1,) what each step adds to the log-probability of the target, nats; the sum over all steps is the
    final log-probability minus the first one, exactly."""
    depth: NDArray[np.int64]
    """(state,) number of tokens whose likeliest token is the final one from this state on, and not before."""
    depth_all_positions: NDArray[np.int64]
    """(state,) the same, with the first token of each document."""
    top_k: tuple[int, ...]
    grid: LensGrid | None
    """Token by token for a few positions of one document."""
    precision: Mapping[str, float] | None
    """Where products were made in another precision than the model's: how far ``kl``, ``entropy`` and
    ``cross_entropy`` are off on a sample of tokens: ``kl_error_max``, ``kl_error_mean`` (nats), ``kl_error_share``."""
    tokens: int
    documents: int
    interval_over: Unit
    """What intervals are over: documents, or windows where there are fewer than ten."""
    tuned: str | None = None
    """Kind of the translators that were applied, if any: ``bias``, ``ridge``, ``kl`` or ``affine match``."""
    on_training_text: bool = False
    """Whether the tuned lens was trained on this very text: its numbers are then better than on any other."""

    @property
    def kl(self) -> Summary:
        """KL divergence of the final distribution from that of each state, nats."""
        return self.metrics["kl"]

    @property
    def entropy(self) -> Summary:
        """Entropy of the distribution at each state, nats."""
        return self.metrics["entropy"]

    @property
    def cross_entropy(self) -> Summary:
        """Cross-entropy of each state's distribution to the target, nats."""
        return self.metrics["cross_entropy"]

    @property
    def mean_depth(self) -> float:
        """Mean index of the state from which the likeliest token is the final one."""
        return float((self.depth * self.states).sum() / max(1, self.depth.sum()))

    def rows(self) -> list[dict[str, Any]]:
        """Return one row for each state."""
        rows = []
        share = self.depth / max(1, self.depth.sum())
        for i, label in enumerate(self.labels):
            row: dict[str, Any] = {"state": int(self.states[i]), "kind": self.kinds[i], "label": label}
            for name, summary in self.metrics.items():
                row |= summary.row(name, i)
            for name, value in self.delta_log_probability.row("delta_log_probability", i - 1).items():
                row[name] = value if i else float("nan")
            row |= {"depth_share": float(share[i]), "interval_over": self.interval_over}
            rows.append(row if self.tuned is None else {**row, "on_training_text": self.on_training_text})
        return rows

    def short_rows(self) -> list[dict[str, Any]]:
        """Return the columns that fit a terminal."""
        chosen = {
            "kl": ("kl", "mean"), "entropy": ("entropy", "mean"), "cross_entropy": ("cross_entropy", "mean"),
            "rank": ("target_rank", "median"), "top1": ("overlap_1", "mean"),
        }  # fmt: skip
        rows = []
        for i, label in enumerate(self.labels):
            row: dict[str, Any] = {"state": int(self.states[i]), "label": label}
            for column, (name, which) in chosen.items():
                if name in self.metrics:
                    row[column] = float(getattr(self.metrics[name], which)[i])
            row["delta_log_p"] = float(self.delta_log_probability.mean[i - 1]) if i else None
            rows.append(row)
        return rows

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the divergence from the final distribution along the stream; without `ax`, as one of five panels."""
        from streamlens.analyses.lens.drawing import plot_kl, plot_panels

        return plot_panels(self) if ax is None else plot_kl(self, ax)

    def plot_delta(self, ax: Axes | None = None) -> Axes:
        """Draw what each step adds to the log-probability of the target, with its interval; nats."""
        from streamlens.analyses.lens.drawing import plot_delta

        return plot_delta(self, ax)

    def plot_grid(self, ax: Axes | None = None) -> Axes:
        """Draw the likeliest token at each state and position of `grid`.

        Raises:
            UsageError: no grid was asked for.
        """
        if self.grid is None:
            raise UsageError("no grid was kept: call logit_lens with grid=True, or grid_positions=range(16, 24)")
        return self.grid.plot(ax)


class LensChoice(TypedDict, total=False):
    """What `logit_lens` looks at, and how; all of it may be left out."""

    states: Sequence[int] | None
    """Which states, 0 ... K; by default all. The last one is always among them."""
    top_k: Sequence[int]
    """Sizes of the sets of likeliest tokens that are compared; by default 1, 5 and 10."""
    dtype: str | torch.dtype | None
    """Of the products with the unembedding, ``"bfloat16"`` for speed; sums are float32 all the same, and the error is
    measured on a sample and reported in `LensResult.precision`. By default the model's own."""
    jsd: bool
    """Also the Jensen-Shannon divergence, which takes several more passes over the logits."""
    chunk_tokens: int | None
    """Tokens whose logits are held at once; by default as many as fit 128 MB."""
    translators: TunedLens | str | Path | None
    """A tuned lens (`train_lens`), or the path of one: applied to each state before the head."""
    affine_match: bool
    """For a post-norm stream: exchange the gain and bias of the norm that made each state for those of the last one,
    which are what the head expects (`AffineMatch`)."""
    grid: bool
    """Whether to keep the likeliest tokens at a few positions of one document; by default it does, where they are
    there. Asked for by this or the next two, positions that are not there are an error."""
    grid_doc: int | None
    """Which document; by default the first."""
    grid_positions: Sequence[int]
    """Which positions of it; by default 0 to 9."""


class _Asked(LensChoice, Corpus, total=False):
    """Both."""


@resting
def logit_lens(
    origin: Origin,
    *,
    stream: str | None = None,
    model: Model | nn.Module | None = None,
    progress: bool = True,
    **asked: Unpack[_Asked],
) -> LensResult:
    """Look at every state through the model's own head.

    Args:
        origin: a capture or its path, a model, module or its path.
        stream: which stream; by default the one that the head reads.
        model: for a capture: its model, where it is loaded already.
        progress: whether to show a bar.
        **asked: what to look at and how, see `LensChoice`; for a live model also what it is shown, as in
            `streamlens.capture`.

    Returns:
        The result; for a model without a head the "lens" is the inner product with its word embeddings, and `head`
        and the title say so.

    Raises:
        UsageError: a state, document or position that is not there, a top_k below 1, an unknown dtype, translators of
            another model, affine_match with translators or in a stream that is not post-norm.
        MissingDataError: neither a head nor word embeddings; or a capture lacks states, or its model is not here.

    >>> from fixtures import zoo
    >>> ids = torch.arange(24).reshape(2, 12)
    >>> found = logit_lens(zoo.build("gpt2").module, tokens=ids, progress=False)
    >>> found.kl.mean.shape, float(found.kl.mean[-1])
    ((7,), 0.0)
    """
    choice, corpus = _sorted(asked)
    source = source_of(origin, stream=stream, model=model, **corpus)
    options, tuned = _options(source, choice), _translators(source, choice)
    tally: LensTally | None = None
    with torch.no_grad(), eager_math():
        for block in watched(source, "lens", progress=progress):
            if tally is None:
                tally = LensTally(source, head_of(source, block), options, tuned)
            tally.update(block)
    assert tally is not None, "a source has at least one block"
    return lens_result(source, tally, tuned)


def _sorted(asked: _Asked) -> tuple[LensChoice, Corpus]:
    own: Any = {name: value for name, value in asked.items() if name in LensChoice.__annotations__}
    rest: Any = {name: value for name, value in asked.items() if name not in own}
    unknown = sorted(set(rest) - set(Corpus.__annotations__))
    if unknown:
        raise TypeError(f"logit_lens() got an unexpected keyword argument {unknown[0]!r}")
    return own, rest


def _options(source: Source, choice: LensChoice) -> LensOptions:
    return LensOptions(
        states=_states(source, choice.get("states")),
        top_k=_sizes(choice.get("top_k", DEFAULT_TOP_K)),
        dtype=precision_named(choice.get("dtype")),
        jsd=choice.get("jsd", False),
        chunk_tokens=choice.get("chunk_tokens"),
        grid_doc=choice.get("grid_doc"),
        grid_positions=tuple(choice.get("grid_positions", range(10))) if choice.get("grid", True) else (),
        grid_demanded=bool(choice.get("grid")) or "grid_positions" in choice,
    )


def lens_result(source: Source, tally: LensTally, tuned: Translators | None = None) -> LensResult:
    """Put the sums together.

    Raises:
        UsageError: the document or the positions of the grid that was asked for are not among the tokens.
    """
    from streamlens.analyses.lens.tuned import TunedLens

    nearest = tally.head.description == NEAREST
    name = "nearest-token lens (no head; word embeddings instead)" if nearest else "logit lens"
    if isinstance(tuned, AffineMatch):
        name = f"{name}, gains and biases matched"
    elif tuned is not None:
        name = f"tuned lens ({tuned.kind}), {name}" if nearest else f"tuned lens ({tuned.kind})"
    known = isinstance(tuned, TunedLens) and tuned.trained_on(source)
    if known:
        name = f"{name}, on the text that it was trained on"
    labels, indices = source.stream.state_labels, np.asarray(tally.options.states)
    steps = source.stream.steps
    kinds = ["+".join(dict.fromkeys(source.stream.sublayers[s].kind for s in step.sublayers)) for step in steps]
    return LensResult(
        title=f"{name}: {source.description}",
        head=tally.head.description,
        head_error=tally.head.error,
        states=indices,
        labels=tuple(labels[k] for k in indices),
        kinds=tuple(["embed", *kinds][k] for k in indices),
        metrics=tally.summaries(),
        delta_log_probability=tally.delta(),
        depth=tally.depth.copy(),
        depth_all_positions=tally.depth_all.copy(),
        top_k=tally.options.top_k,
        grid=tally.grid(f"{name}: {source.description}"),
        precision=tally.precision,
        tokens=tally.tokens,
        documents=tally.documents,
        interval_over=tally.unit,
        tuned=None if tuned is None else tuned.kind,
        on_training_text=known,
    )


def _states(source: Source, wanted: Sequence[int] | None) -> tuple[int, ...]:
    last = len(source.stream.steps)
    chosen = range(last + 1) if wanted is None else wanted
    for k in chosen:
        if not -last - 1 <= k <= last:
            raise UsageError(f"stream {source.stream.name!r} has states 0 to {last}, not {k}")
    return tuple(sorted({range(last + 1)[k] for k in chosen} | {last}))


def _sizes(top_k: Sequence[int]) -> tuple[int, ...]:
    if any(k < 1 for k in top_k):
        raise UsageError(f"top_k counts likeliest tokens, 1 or more, not {min(top_k)}")
    return tuple(sorted(set(top_k)))


def precision_named(given: str | torch.dtype | None) -> torch.dtype | None:
    """Return the dtype that a user named; None stays None.

    Raises:
        UsageError: it is not a floating-point type.
    """
    if given is None or isinstance(given, torch.dtype):
        return given
    found = getattr(torch, {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}.get(given, given), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UsageError(f"products of logits cannot be made in {given}: choose float32, bfloat16 or float64")
    return found


def _translators(source: Source, choice: LensChoice) -> Translators | None:
    given = choice.get("translators")
    if choice.get("affine_match"):
        if given is not None:
            raise UsageError("affine_match and translators both map a state into the coordinates of the last: give one")
        return AffineMatch.of(source)
    if given is None:
        return None
    from streamlens.analyses.lens.tuned import TunedLens, load_lens

    found = given if isinstance(given, TunedLens) else load_lens(given)
    found.check(source)
    return found
