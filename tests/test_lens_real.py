"""The lens on real weights and real text."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from streamlens.analyses.lens.door import logit_lens
from streamlens.analyses.lens.head import NEAREST, LinearHead, head_of
from streamlens.analyses.lens.metrics import Workspace, Yardstick
from streamlens.analyses.lens.trace import Chain
from streamlens.analyses.source import source_of, target_ids
from streamlens.corpus.documents import builtin_documents
from tests.conftest import minilm, smollm2
from tests.test_lens import KS


@pytest.mark.real
def test_smollm2_in_float64_and_in_bfloat16() -> None:
    """All 61 states: float32 within 1e-4 nats of float64, bfloat16 within what it reports."""
    source = source_of(smollm2(), text=builtin_documents()[0], window=48, max_tokens=48)
    block = next(source.blocks())
    head = head_of(source, block)
    assert isinstance(head, LinearHead)
    assert head.vocab == 49152
    single = logit_lens(source, progress=False)
    assert len(single.states) == 61
    exact = LinearHead(Chain.of(lambda x: head.prelude(x).double()), head.weight.double(), head.after)
    some = (0, 1, 20, 40, 59, 60)
    work = Workspace(exact, len(block.ids), KS, torch.float64)
    yardstick = Yardstick(work, block.states[60], target_ids(source, block))
    later = block.position > 0
    for k in some:
        values = yardstick.measure(block.states[k]).values[:, later]
        for i, name in enumerate(("kl", "entropy", "cross_entropy")):
            assert single.metrics[name].mean[k] == pytest.approx(float(values[i].nanmean()), abs=1e-4), (k, name)
    assert single.kl.mean[0] > single.kl.mean[30] > single.kl.mean[59] > 0
    low = logit_lens(source, dtype="bfloat16", states=some, progress=False)
    assert low.precision is not None
    off = np.abs(low.kl.mean - single.kl.mean[list(some)])
    assert 0 < off.max() < low.precision["kl_error_max"]
    assert (off <= 0.01 * single.kl.mean[list(some)]).all(), "rounding of large logits, not a bias"


@pytest.mark.real
def test_minilm_is_looked_at_through_its_word_embeddings() -> None:
    result = logit_lens(minilm(), window=32, max_tokens=128, progress=False)
    assert result.head == NEAREST
    assert len(result.states) == 13
    median = result.metrics["target_rank"].median
    assert median is not None
    assert median[0] == 0, "at x_0 the nearest word is the word itself"
