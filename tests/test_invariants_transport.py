"""Laws of the decomposition: terms sum to each state, shares to one, attributions to the logits; token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import streamlens as sl
from streamlens.analyses.frozen import stream_norms
from streamlens.analyses.norms.measures import OVERLAPPING
from streamlens.analyses.source import Source, source_of, target_ids
from streamlens.analyses.transport import factors_of, pulled_back, transported
from streamlens.analyses.unembedding import Unembedding
from streamlens.block import Block
from streamlens.calling import invoke
from streamlens.observation import tokens
from streamlens.proof import relative_error
from tests.conftest import case
from tests.test_invariants_capture import worst_of_orders


def opened(name: str, stream: str | None = None, dtype: torch.dtype = torch.float32) -> tuple[Source, Block]:
    found = case(name, dtype)
    source = source_of(found.module, inputs=found.inputs, stream=stream)
    (block,) = source.blocks()
    return source, block


def errors(source: Source, block: Block, dtype: torch.dtype = torch.float32) -> list[float]:
    """(state,) relative L2 error of the sum of the terms."""
    norms, factors = stream_norms(source.stream, source.parameters), factors_of(source.stream, source.parameters)
    walked = transported(source.stream, norms, block, factors=factors, dtype=dtype)
    return [
        float(relative_error(torch.stack([p.vectors for p in parts]).sum(0), block.states[k]))
        for k, parts in enumerate(walked)
    ]


def along(source: Source, block: Block, direction: Tensor) -> Tensor:
    """(token,) the sum of what all terms have along a direction at the last state."""
    norms, factors = stream_norms(source.stream, source.parameters), factors_of(source.stream, source.parameters)
    total = torch.zeros(len(direction), dtype=direction.dtype)
    for part, back in pulled_back(source.stream, norms, block, direction, factors=factors):
        total += (part.vectors * back).sum(-1)
    return total


def share_of_all(source: Source, block: Block) -> Tensor:
    """(token,) float64: the projection shares of all terms, which are one."""
    last = block.states[-1].double()
    return along(source, block, last / last.square().sum(-1, keepdim=True))


# ---- terms sum to every state ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "stream"),
    [("bart", "encoder"), ("roberta", None), ("distilbert", None), ("transformer_post", "encoder"), ("t5", "encoder")],
)
def test_terms_sum_to_every_state(name: str, stream: str | None) -> None:
    assert max(errors(*opened(name, stream))) < 1e-5


@pytest.mark.parametrize(
    ("name", "stream"), [("bert", "main"), ("user_post_norm", "main"), ("bart", "encoder"), ("bart", "decoder")]
)
def test_the_order_of_the_terms_does_not_matter(name: str, stream: str) -> None:
    """T-C2 behind norms, which all terms so far have passed; without them see the laws of a capture."""
    source, block = opened(name, stream)
    norms, factors = stream_norms(source.stream, source.parameters), factors_of(source.stream, source.parameters)
    for k, parts in enumerate(transported(source.stream, norms, block, factors=factors)):
        assert worst_of_orders([p.vectors for p in parts], block.states[k]) < 1e-5, k


EXACT = [
    ("bert", "main"), ("user_post_norm", "main"), ("deepnorm", "main"), ("albert", "main"), ("roberta", "main"),
    ("bart", "encoder"), ("bart", "decoder"), ("transformer_post", "encoder"), ("transformer_post", "decoder"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "stream"), EXACT)
def test_the_chain_in_float64_live_and_from_a_file(name: str, stream: str, tmp_path: Path) -> None:
    """T-N2 to 1e-12: the statistics of the norms are as wide as what they were taken from, in a file as well."""
    found = case(name, torch.float64)
    options: dict[str, Any] = {"streams": [stream], "batch_tokens": 4096, "progress": False}
    with sl.capture(found.module, inputs=found.inputs, out=tmp_path / "x.h5", **options) as capture:
        for source in (source_of(found.module, inputs=found.inputs, stream=stream), source_of(capture, stream=stream)):
            (block,) = source.blocks()
            assert {s.dtype for pair in block.norms for s in pair} == {torch.float64}
            assert max(errors(source, block, torch.float64)) < 1e-12
            assert float((share_of_all(source, block) - 1).abs().max()) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_statistics_are_float32_where_the_stream_is_no_wider(dtype: torch.dtype, tmp_path: Path) -> None:
    found = case("bert", dtype)
    with sl.capture(found.module, inputs=found.inputs, out=tmp_path / "x.h5", progress=False) as capture:
        assert capture.stream().norm_mean.dtype == capture.stream().norm_rstd.dtype == torch.float32
        assert capture.attrs["format_version"] == 1


# ---- shares sum to one, for each token ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "stream"),
    [
        ("t5", "encoder"), ("t5", "decoder"), ("bart", "encoder"), ("bart", "decoder"), ("transformer_pre", "encoder"),
        ("transformer_pre", "decoder"), ("transformer_post", "encoder"), ("transformer_post", "decoder"),
        ("bloom", None), ("olmo2", None), ("albert", None), ("gemma2", None), ("gptj", None), ("granite", None),
        ("gpt2", None), ("llama", None), ("bert", None), ("user_post_norm", None),
    ],
)  # fmt: skip
def test_shares_of_each_token_sum_to_one(name: str, stream: str | None) -> None:
    """Of each token, because in a mean gaps of both signs cancel."""
    source, block = opened(name, stream)
    assert float((share_of_all(source, block) - 1).abs().max()) < 2e-6


# ---- attributions sum to the logits ---------------------------------------------------------------------------------

HEADED = ["gpt2", "llama", "gptj", "granite", "cohere", "t5", "bart", "opt", "user_post_norm", "deepnorm", "mamba"]


@pytest.mark.parametrize("name", HEADED)
def test_the_column_of_attributions_adds_up_to_the_mean_logit(name: str) -> None:
    source, block = opened(name)
    result = sl.contribution_norms(source, logits=True, progress=False)
    own = [i for i, c in enumerate(result.contributions) if c.kind not in OVERLAPPING]
    targets = target_ids(source, block)
    kept = (targets >= 0) & (block.position > 0)
    with torch.no_grad():
        logits = tokens(invoke(case(name).module, source.inputs(block)), source.stream, *block.shape).flatten(0, 1)
    whole = (logits.gather(-1, targets.clamp_min(0)[:, None])[:, 0] - logits.mean(-1))[kept]
    constant = Unembedding(source).constant(block, targets)[kept]
    total = result.column("logit_attribution")[own].sum() + float(constant.double().mean())
    assert total == pytest.approx(float(whole.double().mean()), abs=1e-4 * float(whole.abs().max()))


@pytest.mark.parametrize("name", [*HEADED, "gemma2"])
def test_the_measured_logit_is_the_models_own_at_every_state(name: str) -> None:
    """Of any state, because runs with something left out end in other states than the block's."""
    source, block = opened(name)
    module, targets = case(name).module, torch.arange(len(block.ids)) % 7
    unembedding = Unembedding(source)
    docs, positions = block.shape
    for k in (0, 1, len(block.states) - 1):
        with torch.no_grad():
            state = block.states[k].reshape(docs, positions, -1)
            logits = sl.run_from(module, source.anatomy, len(source.stream.steps), state, source.inputs(block))
        truth = tokens(logits, source.stream, docs, positions).flatten(0, 1).gather(-1, targets[:, None])[:, 0]
        found = unembedding.target_logit(block.states[k], targets)
        assert unembedding.capped == (name == "gemma2")
        if unembedding.capped:
            cap = float(module.config.final_logit_softcapping)  # type: ignore[union-attr, arg-type]
            found = cap * torch.tanh(found / cap)
        torch.testing.assert_close(found, truth, rtol=0, atol=2e-5 * float(logits.abs().max()))
