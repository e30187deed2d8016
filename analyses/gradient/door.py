"""How much of the gradient flows back through the skip, and how much through the branch, at each sublayer."""

from __future__ import annotations

from typing import Unpack

import numpy as np
import torch
from torch import Tensor, nn

from streamlens.analyses.gradient.answer import Flow, GradientResult
from streamlens.analyses.gradient.graph import Graph
from streamlens.analyses.gradient.sequences import Sequences, Table, run_through, sequences_of
from streamlens.analyses.source import Corpus, Origin, source_of
from streamlens.analyses.statistics import Floats
from streamlens.checkpoint.model import Model
from streamlens.rest import resting

SEQUENCES = 32
"""How many sequences are differentiated unless more are asked for: 8,192 tokens in windows of 256."""

AT_ONCE = 4
"""How many sequences share a graph unless told: their activations and logits are what takes the memory."""


_SUMS = ("energy", "identity", "step", "branch")


class GradientFlow(Sequences):
    """Folds in the split of the gradient block by block."""

    def _measure(self, graph: Graph) -> dict[str, Tensor]:
        gradients, inner = graph.gradients(), graph.per_sequence
        energies = [inner(g, g) for g in gradients]
        identity = gradients[-1]
        steps: list[Tensor] = []
        branches: dict[int, Tensor] = {}
        identities = [inner(identity, identity)]
        for step in reversed(range(len(graph.stream.steps))):
            own = gradients[step]
            pulled = graph.across(step, torch.stack([gradients[step + 1], identity]))
            skip, identity = pulled.skip
            rest = own - skip
            for sublayer, at_write in pulled.writes.items():
                branch = graph.through(sublayer, at_write[:1])[0]
                rest = rest - branch
                branches[sublayer] = torch.stack([inner(branch, own), inner(branch, branch), inner(branch, skip)])
            normed = pulled.sum[0]
            steps.insert(
                0, torch.stack([inner(skip, own), inner(skip, skip), inner(normed, normed), inner(rest, rest)])
            )
            identities.insert(0, inner(identity, identity))
        return {
            "energy": torch.stack(energies),
            "identity": torch.stack(identities),
            "step": torch.stack(steps),
            "branch": torch.stack([branches[s] for s in sorted(branches)]),
        }

    def result(self) -> GradientResult:
        """Return the means over sequences and their intervals.

        Raises:
            MissingDataError: no sequence has a gradient.
        """
        table, stream = self.table(), self.source.stream
        reads = [s.read for s in stream.sublayers]
        later = {name: table.sums[name][..., 1] for name in _SUMS}
        whole = {name: table.sums[name].sum(-1) for name in _SUMS}
        rest = whole["step"][..., 3] / whole["energy"][:, :-1]
        return GradientResult(
            title=self.title("Gradient flow", table),
            objective=self.objective,
            loss=table.mean(table.sums["loss"]),
            sequences=len(table.doc),
            documents=table.documents,
            unit=table.unit,
            labels=stream.labels,
            kinds=tuple(s.kind for s in stream.sublayers),
            layers=tuple(s.layer for s in stream.sublayers),
            steps=tuple(reads),
            flow=_flow(table, later, reads),
            flow_all=_flow(table, whole, reads),
            closure=float(np.sqrt(rest.max())),
        )


@resting
def gradient_flow(
    origin: Origin,
    *,
    stream: str | None = None,
    model: Model | nn.Module | None = None,
    sequences: int | None = SEQUENCES,
    at_once: int = AT_ONCE,
    progress: bool = True,
    **corpus: Unpack[Corpus],
) -> GradientResult:
    """Split the gradient at every state into what came over the skip and what came through the branch.

    With g_s the gradient of the objective at x_s, y_s = lambda_s x_s + w_s and x_{s+1} = P_s(y_s),

        g_s = lambda_s J_P^T g_{s+1} [skip] + J_branch^T J_P^T g_{s+1} [branch]

    which in a pre-norm model is dL/dx = dL/dy (1 + dF/dx); in a post-norm model the 1 holds at the sum, and the norm
    that follows stands in front of both (He et al. 2016, arXiv 1603.05027; Xiong et al. 2020, arXiv 2002.04745). The
    split is exact, and how exact is part of the result. A parallel layer has one skip and two branches. The scalar
    that is differentiated is the mean cross-entropy of each sequence's targets (nats); where the model has no
    vocabulary, or the tokens are not known, half the squared norm of the last state averaged over positions.

    In an encoder-decoder, one stream is split: the gradient that leaves the encoder by the decoder's cross-attention
    is that of the encoder's last state, and the branch of a cross-attention is what flows back to the decoder's own.

    Args:
        origin: a capture whose model is to be had, a model, or a source. The model itself is run.
        stream: which stream; by default the one that the head reads.
        model: for a capture: its model, where it is loaded already.
        sequences: run so many windows (or documents kept whole), evenly spread over the text; None runs all.
        at_once: how many sequences share a graph; memory grows with it, and nothing else does.
        progress: show a progress bar.
        **corpus: for a live model: what it is shown, as in `streamlens.capture`.

    Raises:
        MissingDataError: the capture's model or inputs are not to be had; or no sequence has a target.
        AnatomyError: the forward pass records no gradients.
        UsageError: less than one sequence, in all or at a time.

    Example:
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
        >>> model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
        >>> found = gradient_flow(model, inputs=torch.randn(4, 5, 8), progress=False)
        >>> shares = found.flow.skip_share + found.flow.branch_share
        >>> found.objective, bool(np.allclose(shares[:, 0], 1, atol=1e-5))
        ('pooled_norm', True)
    """
    source = sequences_of(source_of(origin, stream=stream, model=model, **corpus), sequences)
    flow = GradientFlow(source, at_once)
    run_through(flow, "gradient", progress)
    return flow.result()


def _flow(table: Table, sums: dict[str, Floats], reads: list[int]) -> Flow:
    """Turn sums of each sequence into means over sequences. `reads` is the step of each sublayer."""
    energy, identity, step, branch = (sums[name] for name in _SUMS)
    skip = step[:, reads, 1]
    with np.errstate(invalid="ignore", divide="ignore"):
        found = {
            "gradient_norm": np.sqrt(energy),
            "relative_norm": np.sqrt(energy / energy[:, -1:]),
            "identity_gain": np.sqrt(identity / energy[:, -1:]),
            "skip_share": step[..., 0] / energy[:, :-1],
            "norm_gain": np.sqrt(step[..., 2] / energy[:, 1:]),
            "branch_share": branch[..., 0] / energy[:, reads],
            "branch_to_skip": np.sqrt(branch[..., 1] / skip),
            "cosine": branch[..., 2] / np.sqrt(branch[..., 1] * skip),
        }
    return Flow(**{name: table.mean(values) for name, values in found.items()})
