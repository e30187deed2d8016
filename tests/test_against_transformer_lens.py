"""The same numbers from TransformerLens, on a model that both take; skipped without it (extra `bench`)."""

from __future__ import annotations

import copy
from importlib import import_module
from typing import Any

import pytest
import torch

import streamlens as sl
from streamlens.analyses.source import source_of
from streamlens.analyses.unembedding import Unembedding
from streamlens.checkpoint.model import wrap
from tests.conftest import case

pytest.importorskip("transformer_lens")


@pytest.fixture(scope="module")
def cached() -> tuple[Any, Any, torch.Tensor]:
    """A bridge around the tiny GPT-2, its cache, and the ids."""
    found = case("gpt2")
    sources = import_module("transformer_lens.model_bridge.sources")
    module: Any = copy.deepcopy(found.module)  # the bridge rebuilds what it is given
    bridge = sources.build_bridge_from_module(module, type(module).__name__, hf_config=module.config)
    ids: Any = found.inputs["input_ids"] if isinstance(found.inputs, dict) else found.inputs
    with torch.no_grad():
        _, cache = bridge.run_with_cache(ids)
    return bridge, cache, ids


def test_contribution_norms(cached: tuple[Any, Any, torch.Tensor]) -> None:
    _, cache, _ = cached
    found = case("gpt2")
    result = sl.contribution_norms(found.module, inputs=found.inputs, progress=False)
    labels = [c.label for c in result.contributions]
    for layer in range(3):
        for what, read in (("attn", f"blocks.{layer}.hook_resid_pre"), ("mlp", f"blocks.{layer}.hook_resid_mid")):
            x, w = cache[read][:, 1:].double(), cache[f"blocks.{layer}.hook_{what}_out"][:, 1:].double()
            row = labels.index(f"{layer}_{what}_out")
            assert result.column("relative_write")[row] == pytest.approx(
                float((w.norm(dim=-1) / x.norm(dim=-1)).mean()), rel=1e-4
            )
            cosine = torch.nn.functional.cosine_similarity(x, w, dim=-1).mean()
            assert result.column("cosine")[row] == pytest.approx(float(cosine), abs=1e-5)


def test_direct_logit_attribution(cached: tuple[Any, Any, torch.Tensor]) -> None:
    """`logit_attrs` of the decomposed stream, against the vocabulary's mean, at the targets."""
    bridge, cache, ids = cached
    found = case("gpt2")
    source = source_of(wrap(found.module, "gpt2", {}), inputs=found.inputs)
    (block,) = source.blocks()
    targets = torch.arange(ids.numel()) % 7
    along = Unembedding(source).directions(block, targets)
    parts, labels = cache.decompose_resid(return_labels=True, mode="all")
    norm = found.module.get_submodule("transformer.ln_f")
    head: Any = found.module.get_submodule("lm_head")
    unembed = head.weight[targets] - head.weight.mean(0)
    for part, label in zip(parts, labels, strict=True):
        scaled = cache.apply_ln_to_stack(part[None], layer=-1)[0].flatten(0, 1)
        truth = (scaled * norm.weight * unembed).sum(-1) if not bridge_folds(bridge) else (scaled * unembed).sum(-1)
        ours = (part.flatten(0, 1) * along).sum(-1)
        assert torch.allclose(ours, truth, atol=1e-4), label


def bridge_folds(bridge: Any) -> bool:
    """Whether the bridge moved the norm's gain into the unembedding."""
    return bool(getattr(bridge.cfg, "normalization_type", "LN").endswith("Pre"))


def test_the_column_of_attributions(cached: tuple[Any, Any, torch.Tensor]) -> None:
    """`logit_attribution` of the public result, against the parts of the cache at the tokens that come next."""
    bridge, cache, ids = cached
    found = case("gpt2")
    result = sl.contribution_norms(found.module, inputs=found.inputs, logits=True, progress=False)
    parts, labels = cache.decompose_resid(return_labels=True, mode="all")
    norm, head = found.module.get_submodule("transformer.ln_f"), found.module.get_submodule("lm_head")
    weight: Any = head.weight
    unembed = (weight[ids[:, 1:]] - weight.mean(0))[:, 1:]
    ours = dict(zip((c.label for c in result.contributions), result.column("logit_attribution"), strict=True))
    compared = 0
    for part, label in zip(parts, labels, strict=True):
        scaled = cache.apply_ln_to_stack(part[None], layer=-1)[0][:, 1:-1]
        gain: Any = 1.0 if bridge_folds(bridge) else norm.weight
        if label in ours:
            truth = (scaled * gain * unembed).sum(-1).double().mean()
            assert ours[label] == pytest.approx(float(truth), abs=1e-4), label
            compared += 1
    assert compared >= 7
