"""Layer drop of real weights, against hooks and models rebuilt by hand for these two models alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import streamlens as sl
from streamlens.analyses.ablation.repair import effects
from streamlens.analyses.ablation.sweep import ablate
from streamlens.analyses.source import source_of
from tests.conftest import minilm, smollm2

pytestmark = pytest.mark.real

WINDOW, TOKENS = 64, 192


def loss_by_hand(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean over all positions but the first of each window, which has no token of its own to predict at its end."""
    return F.cross_entropy(logits[:, 1:-1].double().flatten(0, 1), ids[:, 2:].flatten())


def test_smollm2_without_a_layer_equals_a_hook_that_returns_its_input(tmp_path: Path) -> None:
    model = smollm2()
    module: Any = model.module
    path = tmp_path / "x.h5"
    with sl.capture(model, window=WINDOW, max_tokens=TOKENS, batch_tokens=256, out=path, progress=False) as capture:
        ids = capture.tokens.id.reshape(-1, WINDOW).clone()
    with torch.no_grad():
        full = module(ids, use_cache=False).logits
        handle = module.model.layers[20].register_forward_hook(lambda layer, args, output: args[0])
        skipped = module(ids, use_cache=False).logits
        handle.remove()
        handle = module.model.layers[20].mlp.register_forward_hook(lambda mlp, args, output: output * 0)
        silent = module(ids, use_cache=False).logits
        handle.remove()
    for drop, changed in ((20, skipped), ("20.mlp", silent)):
        (row,) = ablate(path, [drop], model=model, progress=False).rows()
        assert row["delta_loss"] == pytest.approx(float(loss_by_hand(changed, ids) - loss_by_hand(full, ids)), abs=2e-5)
        agree = (full.argmax(-1) == changed.argmax(-1)).double()[:, 1:].mean()
        assert row["top1_agreement"] == pytest.approx(float(agree), abs=1e-9)
        p, q = full.double().log_softmax(-1), changed.double().log_softmax(-1)
        assert row["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1)[:, 1:].mean()), abs=2e-5)


def test_minilm_without_a_layer_equals_one_built_without_it() -> None:
    """Post-norm, and no logits: how far the mean-pooled sentence embedding turns."""
    options: dict[str, Any] = {"window": WINDOW, "max_tokens": TOKENS}
    model = minilm()
    found = ablate(model, [3], progress=False, **options)
    assert [d.mode for d in found.drops] == ["skip", "zero"]
    source = source_of(model, **options)
    (block,) = source.blocks()
    ids = block.ids.reshape(block.shape)
    module: Any = model.module
    rebuilt = copy.deepcopy(module)
    del rebuilt.encoder.layer[3]
    with torch.no_grad():
        a, b = (m(ids).last_hidden_state.double().mean(1) for m in (module, rebuilt))
    expected = 1 - torch.cosine_similarity(a, b)
    assert found.rows()[0]["pooled_distance"] == pytest.approx(float(expected.mean()), abs=1e-6)
    assert found.rows()[1]["pooled_distance"] != pytest.approx(float(expected.mean()), abs=1e-3)


def test_effects_of_smollm2_add_up() -> None:
    module: Any = smollm2().module
    source = source_of(smollm2(), window=32, max_tokens=64)
    found = effects(source, units="layers", progress=False)
    (block,) = source.blocks()
    ids = block.ids.reshape(block.shape)
    with torch.no_grad():
        full = module(ids, use_cache=False).logits
        handle = module.model.layers[12].register_forward_hook(lambda layer, args, output: args[0])
        change = (full - module(ids, use_cache=False).logits).double()
        handle.remove()
    picked = change[:, 1:-1].gather(-1, ids[:, 2:, None])
    assert found.rows()[12]["total"] == pytest.approx(float(picked.mean()), abs=1e-4)
