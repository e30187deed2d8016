"""Norms, the write lens and effects in half and double precision, and on an accelerator: the same numbers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import streamlens as sl
from streamlens.analyses.frozen import FrozenNorm, final_norm, stream_norms
from streamlens.analyses.norms.measures import OVERLAPPING
from streamlens.analyses.source import source_of, target_ids
from streamlens.analyses.transport import demand_sum, factors_of
from streamlens.analyses.unembedding import Unembedding
from streamlens.errors import MissingDataError
from streamlens.recorder.pilot import parameters_of
from tests.conftest import case

DTYPES = [torch.bfloat16, torch.float16, torch.float64]
QUIET: dict[str, Any] = {"progress": False}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["bert", "user_post_norm", "roberta", "deepnorm"])
def test_norms_on_the_stream_are_the_models_own_numbers(name: str, dtype: torch.dtype) -> None:
    found = case(name, dtype)
    parameters = parameters_of(found.module)
    stream = found.anatomy.stream()
    norms = stream_norms(stream, parameters)
    assert norms
    for norm in stream.norms:
        if norm.state is None:
            continue
        assert norm.weight is not None
        assert norm.bias is not None
        own = norms[norm.state]
        assert own.gain.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.equal(own.gain, parameters[norm.weight].detach().to(own.gain.dtype))
        assert torch.equal(own.bias, parameters[norm.bias].detach().to(own.gain.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "olmo2"])
def test_the_final_norm_is_the_models_own_numbers(name: str, dtype: torch.dtype) -> None:
    """Not read through outputs that half precision rounds: one part in 250 of every gain."""
    found = case(name, dtype)
    stream = found.anatomy.stream()
    located = final_norm(stream, found.module)
    assert located is not None
    norm = located[1]
    module: Any = found.module.get_submodule(stream.norms[located[0]].module)
    weight = module.weight.detach().to(norm.gain.dtype)
    expected = 1.0 + weight if name == "gemma2" else weight
    torch.testing.assert_close(norm.gain, expected, rtol=0, atol=1e-7 if name == "gemma2" else 0)
    if name == "gpt2":
        assert torch.equal(norm.bias, module.bias.detach().to(norm.gain.dtype))


def test_a_frozen_norm_follows_what_it_is_applied_to() -> None:
    norm = FrozenNorm(True, torch.rand(6), torch.rand(6))
    rstd = torch.rand(4)
    for dtype in (torch.float32, torch.float64):
        vectors = torch.randn(4, 6, dtype=dtype)
        assert norm.linear(vectors, rstd).dtype == norm.adjoint(vectors, rstd).dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["bert", "user_post_norm", "roberta", "llama", "scaled_skip_parameter"])
def test_shares_sum_to_one(name: str, dtype: torch.dtype) -> None:
    found = case(name, dtype)
    result = sl.contribution_norms(found.module, inputs=found.inputs, **QUIET)
    own = [i for i, c in enumerate(result.contributions) if c.kind not in OVERLAPPING]
    # Statistics of norms are stored in float32, whatever the model is in.
    allowed = max(1e-6, 4 * torch.finfo(dtype).eps)
    assert result.column("projection_share")[own].sum() == pytest.approx(1.0, abs=allowed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["user_post_norm", "llama", "opt", "scaled_skip_parameter"])
def test_effects_and_the_write_lens(name: str, dtype: torch.dtype) -> None:
    """The total is measured in a run; float32 tells how large it should be."""
    whole = case(name)
    truth = sl.effects(whole.module, inputs=whole.inputs, **QUIET).means
    found = case(name, dtype)
    effects = sl.effects(found.module, inputs=found.inputs, **QUIET).means
    lens = sl.write_lens(found.module, inputs=found.inputs)
    size = float(abs(truth["total"]).max())
    eps = torch.finfo(dtype).eps
    allowed = max(1e-5, 4 * eps) * max(size, 1.0)
    parts = effects["direct"] + effects["indirect"] + effects["norm"]
    assert parts == pytest.approx(effects["total"], abs=allowed)
    for kind in ("direct", "total"):
        assert effects[kind] == pytest.approx(truth[kind], abs=8 * allowed)
    assert lens.error < max(1e-5, 8 * eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_a_head_with_a_layer_of_its_own_is_refused_in_words(name: str, dtype: torch.dtype) -> None:
    found = case(name, dtype)
    with pytest.raises(MissingDataError, match="not linear behind its norm"):
        sl.effects(found.module, inputs=found.inputs, **QUIET)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_direct_attribution_in_half_precision_is_as_good_as_the_stream(name: str) -> None:
    """Against the logits of the same bfloat16 stream by a float32 head: what is left is the rounding of the stream."""
    found = case(name, torch.bfloat16)
    source = source_of(found.module, inputs=found.inputs)
    (block,) = source.blocks()
    targets = target_ids(source, block).clamp_min(0)
    unembedding = Unembedding(source)
    along = unembedding.directions(block, targets, centred=False)
    shares = (block.states[-1].float() * along).sum(-1) + unembedding.constant(block, targets, centred=False)
    head = copy.deepcopy(found.module).float()
    norm: Any = head.get_submodule(source.stream.norms[-1].module)
    with torch.no_grad():
        own = norm(block.states[-1].float()) @ head.get_output_embeddings().weight.t()  # type: ignore[operator]
    truth = own.gather(-1, targets[:, None])[:, 0]
    torch.testing.assert_close(shares, truth, rtol=0, atol=1e-5 * float(own.abs().max()))


def test_a_stream_that_does_not_add_up_is_refused() -> None:
    """A gain that is wrong stands for anything that the terms do not account for."""
    found = case("user_post_norm")
    source = source_of(found.module, inputs=found.inputs)
    (block,) = source.blocks()
    norms = stream_norms(source.stream, source.parameters)
    factors = factors_of(source.stream, source.parameters)
    demand_sum(source.stream, norms, block, factors)
    norms[2] = FrozenNorm(True, norms[2].gain * 1.01, norms[2].bias)
    with pytest.raises(MissingDataError, match="do not sum to its last state"):
        demand_sum(source.stream, norms, block, factors)


@pytest.mark.parametrize("name", ["llama", "gpt2", "user_post_norm", "granite"])
def test_norms_of_writes_that_are_not_the_streams_are_refused(name: str) -> None:
    found = case(name)
    source = source_of(found.module, inputs=found.inputs)
    (block,) = source.blocks()
    source.blocks = lambda: iter([block])  # type: ignore[method-assign]
    assert sl.contribution_norms(source, **QUIET).n_tokens == len(block.ids)
    block.writes[2].mul_(1.01)
    with pytest.raises(MissingDataError, match="do not sum to its last state"):
        sl.contribution_norms(source, **QUIET)


def on_cuda(name: str) -> tuple[Any, Any]:
    found = case(name)
    inputs: Any = found.inputs
    moved = (
        {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        if isinstance(inputs, dict)
        else inputs.cuda()
    )
    return copy.deepcopy(found.module).cuda(), moved


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["llama", "gemma2", "user_post_norm", "scaled_skip_parameter"])
class TestOnCuda:
    """Everything that is learned from the model, or taken from a block, must meet on one device."""

    def test_contribution_norms(self, name: str) -> None:
        found = case(name)
        module, inputs = on_cuda(name)
        options: dict[str, Any] = {"heads": True, "logits": True, **QUIET}
        here = sl.contribution_norms(found.module, inputs=found.inputs, **options)
        there = sl.contribution_norms(module, inputs=inputs, **options)
        for column in ("projection_share", "logit_attribution", "proximity", "growth"):
            assert there.column(column) == pytest.approx(here.column(column), rel=1e-3, abs=1e-4, nan_ok=True)

    def test_effects(self, name: str) -> None:
        found = case(name)
        module, inputs = on_cuda(name)
        here = sl.effects(found.module, inputs=found.inputs, **QUIET).means
        there = sl.effects(module, inputs=inputs, **QUIET).means
        for kind, values in here.items():
            assert there[kind] == pytest.approx(values, rel=1e-3, abs=1e-4)

    def test_write_lens(self, name: str) -> None:
        found = case(name)
        module, inputs = on_cuda(name)
        here = sl.write_lens(found.module, inputs=found.inputs)
        there = sl.write_lens(module, inputs=inputs)
        assert there.target_logit == pytest.approx(here.target_logit, rel=1e-3, abs=1e-3, nan_ok=True)

    def test_effects_of_a_capture(self, name: str, tmp_path: Any) -> None:
        """Its blocks are in main memory, its model is not."""
        found = case(name)
        module, _ = on_cuda(name)
        ids = torch.arange(40).reshape(4, 10)
        model = sl.load(module)
        here = sl.effects(found.module, tokens=list(ids), window=10, **QUIET).means
        with sl.capture(model, tokens=list(ids), window=10, out=tmp_path / "x.h5", **QUIET) as capture:
            there = sl.effects(capture, model=model, **QUIET).means
            sl.contribution_norms(capture, model=model, logits=True, **QUIET)
        for kind, values in here.items():
            assert there[kind] == pytest.approx(values, rel=1e-3, abs=1e-4)
