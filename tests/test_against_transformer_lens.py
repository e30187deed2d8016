"""The same numbers from TransformerLens, on models that both take; skipped without it (extra `bench`)."""

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


Cached = tuple[str, Any, Any, torch.Tensor]

PLACES = {"gpt2": "transformer.ln_f", "llama": "model.norm", "gptj": "transformer.ln_f"}
"""Serial with a LayerNorm, serial with an RMS norm and gates, parallel: with the module of the final norm."""


@pytest.fixture(scope="module", params=list(PLACES))
def cached(request: pytest.FixtureRequest) -> Cached:
    """The name of a tiny model, a bridge around it, its cache, and the ids."""
    found = case(request.param)
    sources = import_module("transformer_lens.model_bridge.sources")
    module: Any = copy.deepcopy(found.module)  # the bridge rebuilds what it is given
    bridge = sources.build_bridge_from_module(module, type(module).__name__, hf_config=module.config)
    ids: Any = found.inputs["input_ids"] if isinstance(found.inputs, dict) else found.inputs
    with torch.no_grad():
        _, cache = bridge.run_with_cache(ids)
    return request.param, bridge, cache, ids


def test_contribution_norms(cached: Cached) -> None:
    name, _, cache, _ = cached
    found = case(name)
    result = sl.contribution_norms(found.module, inputs=found.inputs, progress=False)
    labels = [c.label for c in result.contributions]
    middle = "pre" if name == "gptj" else "mid"
    for layer in range(found.anatomy.stream().layers):
        for what, place in (("attn", "pre"), ("mlp", middle)):
            x = cache[f"blocks.{layer}.hook_resid_{place}"][:, 1:].double()
            w = cache[f"blocks.{layer}.hook_{what}_out"][:, 1:].double()
            row = labels.index(f"{layer}_{what}_out")
            assert result.column("relative_write")[row] == pytest.approx(
                float((w.norm(dim=-1) / x.norm(dim=-1)).mean()), rel=1e-4
            )
            cosine = torch.nn.functional.cosine_similarity(x, w, dim=-1).mean()
            assert result.column("cosine")[row] == pytest.approx(float(cosine), abs=1e-5)


def decomposed(cached: Cached) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """The label of each part of the cache, the part, and the part as it stands behind the final norm with its gain."""
    name, bridge, cache, _ = cached
    parts, labels = cache.decompose_resid(return_labels=True, mode="all")
    gain: Any = case(name).module.get_submodule(PLACES[name]).weight
    scaled = cache.apply_ln_to_stack(parts, layer=-1)
    return list(zip(labels, parts, scaled if bridge_folds(bridge) else scaled * gain, strict=True))


def bridge_folds(bridge: Any) -> bool:
    """Whether the bridge moved the norm's gain into the unembedding."""
    return bool(getattr(bridge.cfg, "normalization_type", "LN").endswith("Pre"))


def test_direct_logit_attribution(cached: Cached) -> None:
    """`logit_attrs` of the decomposed stream, against the vocabulary's mean, at the targets."""
    name, _, _, ids = cached
    found = case(name)
    source = source_of(wrap(found.module, name, {}), inputs=found.inputs)
    (block,) = source.blocks()
    targets = torch.arange(ids.numel()) % 7
    along = Unembedding(source).directions(block, targets)
    head: Any = found.module.get_submodule("lm_head")
    unembed = head.weight[targets] - head.weight.mean(0)
    for label, part, scaled in decomposed(cached):
        truth = (scaled.flatten(0, 1) * unembed).sum(-1)
        ours = (part.flatten(0, 1) * along).sum(-1)
        assert torch.allclose(ours, truth, atol=1e-4), label


def test_the_column_of_attributions(cached: Cached) -> None:
    """`logit_attribution` of the public result, against the parts of the cache at the tokens that come next."""
    name, _, _, ids = cached
    found = case(name)
    result = sl.contribution_norms(found.module, inputs=found.inputs, logits=True, progress=False)
    weight: Any = found.module.get_submodule("lm_head").weight
    unembed = (weight[ids[:, 1:]] - weight.mean(0))[:, 1:]
    ours = dict(zip((c.label for c in result.contributions), result.column("logit_attribution"), strict=True))
    compared = 0
    for label, _, scaled in decomposed(cached):
        if label in ours:
            truth = (scaled[:, 1:-1] * unembed).sum(-1).double().mean()
            assert ours[label] == pytest.approx(float(truth), abs=1e-4), label
            compared += 1
    assert compared >= 1 + len(found.anatomy.stream().sublayers)
