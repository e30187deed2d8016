"""Contribution norms on real weights and real text: the exact identities, and facts that the literature reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import streamlens as sl
from streamlens.analyses.norms.measures import MEASURES, OVERLAPPING
from streamlens.analyses.source import source_of, target_ids
from streamlens.analyses.unembedding import Unembedding
from tests.conftest import minilm, smollm2

pytestmark = pytest.mark.real

TOKENS, WINDOW = 512, 128


def test_smollm2(tmp_path: Path) -> None:
    model = smollm2()
    out = tmp_path / "x.h5"
    with sl.capture(model, out=out, window=WINDOW, max_tokens=TOKENS, heads=True, progress=False) as capture:
        result = sl.contribution_norms(capture, model=model, heads=True, logits=True, progress=False)
        source = source_of(capture, model=model)
        (block,) = source.blocks()
        targets = target_ids(source, block)
        constant = Unembedding(source).constant(block, targets)[(block.position > 0) & (targets >= 0)].double().mean()
        lse, logit = capture.output["lse"], capture.output["target_logit"]
        with torch.no_grad():
            module: Any = model.module
            logits = module.lm_head(module.model.norm(capture.final))
        kept = (block.position > 0) & (targets >= 0)
        whole = float((logit - logits.mean(-1))[kept].double().mean())
        assert torch.isfinite(lse).all()
    own = [i for i, c in enumerate(result.contributions) if c.kind not in OVERLAPPING]
    assert result.column("projection_share")[own].sum() == pytest.approx(1.0, abs=1e-5)
    assert result.column("logit_attribution")[own].sum() + float(constant) == pytest.approx(whole, abs=1e-3)
    assert sum(c.kind == "head" for c in result.contributions) == 30 * 9
    # Heimersheim and Turner: the size of the stream grows about geometrically; Sun: position 0 is of another size.
    states = result.states
    slope = np.polyfit(np.arange(31), np.log(states.mean[::2]), 1)[0]
    assert states.growth == pytest.approx(float(np.exp(slope)))
    assert states.growth > 1
    massive = [m for m in states.massive if m.state == 30]
    assert massive, "an attention sink"
    assert all(m.tokens == m.first_tokens == 4 for m in massive), "at position 0 of each window and nowhere else"
    read = MEASURES.index("read_norm")
    middle = [c.label for c in result.contributions].index("15_attn_out")
    assert result.mean_with_first[middle, read] > 1.5 * result.mean[middle, read]


def test_minilm(tmp_path: Path) -> None:
    """Twelve norms on the stream: the shares go through all of them, biases included."""
    model = minilm()
    with sl.capture(model, out=tmp_path / "x.h5", window=64, max_tokens=TOKENS, progress=False) as capture:
        result = sl.contribution_norms(capture, progress=False)
    own = [i for i, c in enumerate(result.contributions) if c.kind not in OVERLAPPING]
    assert {result.contributions[i].kind for i in own} == {"embed", "attn", "mlp", "norm"}
    assert len(own) == 3 + 12 + 13
    assert result.column("projection_share")[own].sum() == pytest.approx(1.0, abs=1e-5)
    assert result.identity_gain < 0.3
