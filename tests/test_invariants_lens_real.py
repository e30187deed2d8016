"""Laws of the lenses (METHODS.md, T-L1 to T-L5 and T-L7) for SmolLM2 and real text, by its own modules alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from streamlens.analyses.lens.door import logit_lens
from streamlens.analyses.lens.tuned import TunedLens, train_lens
from streamlens.analyses.lens.writes import write_lens
from streamlens.analyses.sampling import some_rows
from streamlens.analyses.source import Source, source_of
from streamlens.block import Block
from streamlens.calling import Inputs
from streamlens.reader.opening import Capture
from tests.conftest import minilm, smollm2
from tests.test_lens import _one

pytestmark = pytest.mark.real

SOME = (0, 1, 20, 41, 59, 60)
VOCAB = 49152


@dataclass
class Beginnings:
    """The first positions of each document of a source."""

    whole: Any
    length: int

    def __getattr__(self, name: str) -> Any:
        return getattr(self.whole, name)

    def blocks(self) -> Iterator[Block]:
        for block in self.whole.blocks():
            yield some_rows(block, torch.nonzero(block.position < self.length)[:, 0], block.start)

    def inputs(self, block: Block) -> Inputs:
        found: Inputs = self.whole.inputs(block)
        return found


@pytest.fixture(scope="module")
def source(smollm2_file: Capture) -> Source:
    return source_of(smollm2_file, model=smollm2())


@pytest.fixture(scope="module")
def block(source: Source) -> Block:
    return next(iter(source.blocks()))


@pytest.fixture(scope="module")
def logits(block: Block) -> Tensor:
    """(token, vocab) float64 of the model itself, from the ids alone."""
    module: Any = smollm2().module
    with torch.no_grad():
        out: Tensor = module(block.ids.reshape(block.shape), use_cache=False).logits
    return out.flatten(0, 1).double()


def seen(block: Block, k: int) -> Tensor:
    """(token, vocab) float64 logits of a state, by the model's own norm and unembedding."""
    module: Any = smollm2().module
    with torch.no_grad():
        out: Tensor = module.lm_head(module.model.norm(block.states[k]))
    return out.double()


def judged(block: Block) -> tuple[Tensor, Tensor]:
    """Rows with a target but position 0, and these targets: the next token of the same document."""
    rows = torch.tensor([t for t in range(block.stop - 1) if 0 < block.position[t] < block.position[t + 1]])
    return rows, block.ids[rows + 1]


def test_states_through_the_door(source: Source, block: Block, logits: Tensor) -> None:
    """T-L1, T-L2 and T-L4: the last state is the model, equal to itself; steps add up to all that was gained."""
    result = logit_lens(source, states=SOME, jsd=True, chunk_tokens=40, progress=False)
    assert result.kl.mean[-1] == 0
    assert result.metrics["jsd"].mean[-1] == pytest.approx(0, abs=1e-7)
    assert result.metrics["top1_rank"].mean[-1] == 0
    assert all(result.metrics[f"overlap_{k}"].mean[-1] == 1 for k in (1, 5, 10))
    rows, targets = judged(block)
    own = torch.nn.functional.cross_entropy(logits[rows], targets)
    assert result.cross_entropy.mean[-1] == pytest.approx(float(own), rel=1e-5)
    loss = [torch.nn.functional.cross_entropy(seen(block, k)[rows], targets) for k in SOME]
    np.testing.assert_allclose(result.cross_entropy.mean, torch.stack(loss), rtol=1e-4)
    gained = [float(before - after) for before, after in itertools.pairwise(loss)]
    np.testing.assert_allclose(result.delta_log_probability.mean, gained, atol=2e-4)
    assert result.delta_log_probability.mean.sum() == pytest.approx(float(loss[0] - own), abs=2e-4)


def test_all_states_of_some_tokens(source: Source, block: Block) -> None:
    """T-L3 and T-L4 over all 61 states: bounds, sums of steps; some of them densely, in float64, token by token."""
    few = Beginnings(source, 6)
    result = logit_lens(few, jsd=True, chunk_tokens=5, progress=False)
    assert len(result.states) == 61
    assert float(result.kl.mean.min()) == 0
    assert 0 <= result.metrics["jsd"].mean.min() <= result.metrics["jsd"].mean.max() <= math.log(2)
    assert 0 <= result.entropy.mean.min() <= result.entropy.mean.max() <= math.log(VOCAB)
    lost = result.cross_entropy.mean[0] - result.cross_entropy.mean[-1]
    assert result.delta_log_probability.mean.sum() == pytest.approx(lost, abs=1e-6)
    (part,) = few.blocks()
    rows = torch.nonzero(part.position > 0)[:, 0]
    final = seen(part, 60)
    for k in (0, 17, 44, 60):
        lens = seen(part, k)
        exact = [_one(final[t], lens[t], -1) for t in rows]
        assert all(e["kl"] >= -1e-9 for e in exact)
        assert all(-1e-9 <= e["jsd"] <= math.log(2) + 1e-9 for e in exact)
        for name in ("kl", "entropy", "jsd", "top1_rank", "overlap_1", "overlap_5", "overlap_10"):
            truth = float(np.mean([e[name] for e in exact]))
            assert result.metrics[name].mean[k] == pytest.approx(truth, abs=2e-4 * max(1.0, truth)), (k, name)


def test_writes_add_up_and_are_no_states(source: Source, block: Block, logits: Tensor) -> None:
    """T-L7: all parts are the centred logit; a running sum is the lens but for the ratio of two scales."""
    result = write_lens(source, positions=range(1, 5))
    centred = logits - logits.mean(-1, keepdim=True)
    rows = torch.arange(1, 5)
    targets = block.ids[rows + 1]
    assert result.targets.tolist() == targets.tolist()
    whole = centred[rows].gather(1, targets[:, None])[:, 0]
    np.testing.assert_allclose(result.target_logit.sum(0), whole, atol=1e-4 * float(whole.abs().max()))
    parts = dict(zip(result.labels, result.target_logit, strict=True))
    labels = [source.stream.parts[0].label, *source.stream.labels]
    assert list(parts) == labels, "this model has no biases"
    for k in (0, 10, 30, 55):
        summed = sum((parts[label] for label in labels[: k + 1]), np.zeros(4))
        own_logits = seen(block, k)[rows]
        lens = (own_logits - own_logits.mean(-1, keepdim=True)).gather(1, targets[:, None])[:, 0].numpy()
        own, last = (block.states[j][rows].double().square().mean(-1).add(1e-5).sqrt().numpy() for j in (k, 60))
        np.testing.assert_allclose(summed * last / own, lens, rtol=2e-3, atol=2e-3)
        assert np.abs(summed - lens).max() > 0.1, "another thing altogether"


def bare(lens: TunedLens) -> TunedLens:
    """The lens before any training."""
    assert lens.matrix is not None
    nothing = {"matrix": torch.zeros_like(lens.matrix), "bias": torch.zeros_like(lens.bias)}
    return TunedLens(**{**vars(lens), **nothing})


def test_a_tuned_lens_at_first_and_after_a_few_steps(source: Source) -> None:
    """T-L5: zeros are the logit lens, bit for bit; trained, each of the 60 states is nearer on what taught it."""
    few = Beginnings(source, 8)
    lens = train_lens(few, kind="kl", start="zero", steps=2, step_tokens=4, learning_rate=1e-4, progress=False)
    assert (lens.train_tokens, lens.held_out_documents) == (8, 1)
    plain, before = (logit_lens(few, states=SOME, translators=t, progress=False) for t in (None, bare(lens)))
    for name, summary in plain.metrics.items():
        np.testing.assert_array_equal(before.metrics[name].mean, summary.mean)
    assert (lens.kl[:-1, 0] < lens.kl_logit_lens[:-1, 0]).all(), "on the other document, too"
    (part,) = few.blocks()
    judged_on = [mean_kl(part, (part.doc == doc) & (part.position > 0), 40) for doc in (0, 1)]
    held = int(abs(judged_on[1] - lens.kl_logit_lens[40, 0]) < abs(judged_on[0] - lens.kl_logit_lens[40, 0]))
    assert lens.kl_logit_lens[40, 0] == pytest.approx(judged_on[held], rel=1e-4)
    told = mean_kl(part, (part.doc == held) & (part.position > 0), 40, lens)
    assert lens.kl[40, 0] == pytest.approx(told, rel=1e-4)
    trained = part.doc != held
    for k in range(60):
        assert mean_kl(part, trained, k, lens) < mean_kl(part, trained, k), k


def mean_kl(part: Block, rows: Tensor, k: int, lens: TunedLens | None = None) -> float:
    """KL(final || lens) of some tokens, by the model's own norm and unembedding."""
    module: Any = smollm2().module
    state, final = part.states[k][rows], part.states[60][rows]
    with torch.no_grad():
        if lens is not None:
            assert lens.matrix is not None
            state = state + state @ lens.matrix[k].T + lens.bias[k]
        ours, own = (module.lm_head(module.model.norm(s)).double().log_softmax(-1) for s in (final, state))
    return float((ours.exp() * (ours - own)).sum(-1).mean())


def test_minilm_has_no_head_and_its_lens_says_so(minilm_file: Capture) -> None:
    """No law of the lens is about this model: what is looked through is its word embeddings, and equal to itself."""
    result = logit_lens(source_of(minilm_file, model=minilm()), states=[0, 6, 12], progress=False)
    assert "nearest-token" in result.title
    assert result.kl.mean[-1] == 0
