"""Laws of the lenses: raw divergences in float64, frozen against recomputed norms, planted truth, matched gains."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fixtures import planted, zoo
from streamlens.analyses.lens.door import logit_lens
from streamlens.analyses.lens.head import head_of
from streamlens.analyses.lens.metrics import METRICS, Workspace, Yardstick
from streamlens.analyses.lens.tuned import train_lens
from streamlens.analyses.lens.writes import write_lens
from streamlens.analyses.source import source_of
from streamlens.errors import UsageError
from tests import test_lens_kernel
from tests.conftest import case
from tests.test_lens import KS, _one, look, plain

SHAPES = ["gpt2", "llama", "bert", "user_post_norm", "gemma2", "gptj", "granite", "t5", "bart"]


def test_the_kernel_in_float64() -> None:
    head, first, second, targets = test_lens_kernel.TestKernel().setting()
    head.weight = head.weight.double()
    first, second = first.double(), second.double()
    work = Workspace(head, len(first), KS, torch.float64, jsd=True)
    found = Yardstick(work, first, targets).measure(second)
    assert found.jsd is not None
    for t in range(len(first)):
        exact = _one(head.weight @ first[t], head.weight @ second[t], int(targets[t]))
        for i, name in enumerate(METRICS):
            truth = exact.get(name, np.nan)
            assert float(found.values[i, t]) == pytest.approx(truth, rel=1e-12, abs=1e-12, nan_ok=True), name
        assert float(found.jsd[t]) == pytest.approx(exact["jsd"], abs=1e-12)


@pytest.mark.parametrize("step", [1e-3, 1e-2, 3.0])
def test_small_divergences_are_right_and_not_only_not_negative(step: float) -> None:
    """A clamp at zero or at ln 2 would hide an error of the sums; the exact values in float64 do not."""
    head, first, other, targets = test_lens_kernel.TestKernel().setting()
    second = first + step * other
    found = Yardstick(Workspace(head, len(first), (1,), torch.float32, jsd=True), first, targets).measure(second)
    assert found.jsd is not None
    weight = head.weight.double()
    for t in range(len(first)):
        exact = _one(weight @ first[t].double(), weight @ second[t].double(), -1)
        close = 5e-6 * max(1.0, exact["kl"])
        assert 0 <= exact["jsd"] <= np.log(2)
        assert float(found.values[0, t]) == pytest.approx(exact["kl"], abs=close)
        assert float(found.jsd[t]) == pytest.approx(exact["jsd"], abs=5e-6)


@pytest.mark.parametrize("name", SHAPES)
def test_the_last_state_is_equal_to_itself(name: str) -> None:
    """T-L2, through the door."""
    result = look(case(name), jsd=True)
    assert result.kl.mean[-1] == 0
    assert result.metrics["jsd"].mean[-1] == pytest.approx(0, abs=1e-7)
    assert result.metrics["top1_rank"].mean[-1] == 0
    assert all(result.metrics[f"overlap_{k}"].mean[-1] == 1 for k in KS)
    assert result.kl.mean[:-1].min() > 0


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("rows", [1, 1 << 30])
def test_rows_and_chunks_do_not_matter(name: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = look(case(name))
    monkeypatch.setattr("streamlens.analyses.lens.metrics.CACHE_BYTES", rows)
    cut = look(case(name), chunk_tokens=1 if rows == 1 else 3)
    for metric, summary in whole.metrics.items():
        np.testing.assert_allclose(cut.metrics[metric].mean, summary.mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SHAPES)
def test_gains_are_those_of_the_models_own_logits(name: str) -> None:
    """T-L4: each step's gain in log p(target), by the model's own head run on both states, and what they come to."""
    found = case(name)
    values, _, block = plain(found)
    log_p = -values["cross_entropy"]
    gained = (log_p[1:] - log_p[:-1])[:, block.position > 0].nanmean(1)
    own = look(found).delta_log_probability.mean
    np.testing.assert_allclose(own, gained, rtol=1e-4, atol=2e-5)
    whole = (log_p[-1] - log_p[0])[block.position > 0].nanmean()
    assert own.sum() == pytest.approx(float(whole), rel=1e-5, abs=2e-5)


@pytest.mark.parametrize("name", ["raw_parameters", "llama", "gpt2", "gptj", "granite", "t5"])
def test_a_running_sum_of_writes_is_a_state_seen_through_the_last_norm(name: str) -> None:
    """Without a final norm it is the logit lens; with one it is off by the ratio of the two scales, and biases."""
    found = case(name)
    source = source_of(found.module, inputs=found.inputs)
    block = next(iter(source.blocks()))
    rows = torch.nonzero((block.doc == 0) & (block.position < 6))[:, 0]
    result, head = write_lens(source, positions=range(6)), head_of(source, block)
    known = result.targets >= 0
    summed, last = np.zeros(len(rows)), len(source.stream.steps)
    parts = dict(zip(result.labels, result.target_logit, strict=True))
    summed = sum((parts[p.label] for p in source.stream.parts), summed)
    scale = [1 / sigma(block.states[k][rows].double(), centred=name in ("gpt2", "gptj")) for k in range(last + 1)]
    biases = sum((v for label, v in parts.items() if label.startswith("bias:")), np.zeros(len(rows)))
    for k in range(last + 1):
        if k:
            for s in source.stream.steps[k - 1].sublayers:
                summed = summed + parts[source.stream.sublayers[s].label]
        with torch.no_grad():
            logits = head.logits(block.states[k][rows]).double()
        logits = logits - logits.mean(-1, keepdim=True)
        stream = logits.gather(1, torch.from_numpy(result.targets).clamp_min(0)[:, None])[:, 0].numpy()
        if name == "raw_parameters":
            np.testing.assert_allclose((summed + biases)[known], stream[known], atol=1e-4)
        else:
            rescaled = summed * (scale[k] / scale[last]).numpy() + biases
            np.testing.assert_allclose(rescaled[known], stream[known], rtol=2e-3, atol=2e-4)
        if name != "raw_parameters" and k < last:
            assert np.abs(summed - stream)[known].max() > 5e-3, "another thing altogether"


def sigma(state: Tensor, *, centred: bool) -> Tensor:
    """(token,) the size by which the final norm divides, but for its epsilon."""
    return (state - state.mean(-1, keepdim=True) if centred else state).square().mean(-1).sqrt()


@pytest.mark.parametrize("name", ["gptj", "gemma2", "granite", "t5"])
def test_nothing_written_and_every_state_says_the_same(name: str) -> None:
    module = zoo.build(name).module
    silent = {
        "gptj": ("out_proj", "fc_out"), "gemma2": ("post_",), "granite": ("o_proj", "down_proj"), "t5": (".o.", ".wo."),
    }[name]  # fmt: skip
    for path, parameter in module.named_parameters():
        if any(part in path for part in silent):
            parameter.data.fill_(-1.0 if "layernorm" in path else 0.0)  # Gemma's norms add one to their weight
    result = logit_lens(module, tokens=torch.arange(40).reshape(4, 10), progress=False)
    assert (result.kl.mean == 0).all()
    assert (result.delta_log_probability.mean == 0).all()
    assert result.depth[0] == result.depth.sum()


def test_a_dead_layer_gains_nothing() -> None:
    result = logit_lens(planted.dead_layer(), tokens=planted.documents(), progress=False)
    gained = dict(zip(result.labels[1:], result.delta_log_probability.mean, strict=True))
    dead = [value for label, value in gained.items() if label.startswith("1_")]
    assert dead
    assert all(value == 0 for value in dead)
    assert max(gained.values()) > 1, "the other layer knows the answer"


@pytest.mark.parametrize("name", ["user_post_norm", "bert"])
def test_gains_and_biases_are_matched(name: str) -> None:
    """(x - beta_k) / gamma_k * gamma_K + beta_K by hand, with the norms' own parameters, through the model's head."""
    found = case(name)
    source = source_of(found.module, inputs=found.inputs)
    block, stream = next(iter(source.blocks())), source.stream
    matched, bare = (look(found, affine_match=on) for on in (True, False))
    head = head_of(source, block)
    modules: dict[int, Any] = {
        n.state: found.module.get_submodule(n.module) for n in stream.norms if n.state is not None
    }
    final = head.logits(block.states[-1]).double().log_softmax(-1)
    for k in range(len(stream.steps)):
        state = block.states[k]
        if k in modules:
            own, last = modules[k], modules[len(stream.steps)]
            state = (state - own.bias) / own.weight * last.weight + last.bias
        with torch.no_grad():
            lens = head.logits(state).double().log_softmax(-1)
        kl = (final.exp() * (final - lens)).sum(-1)[block.position > 0].mean()
        assert matched.kl.mean[k] == pytest.approx(float(kl), rel=1e-3, abs=1e-4), k
    assert np.abs(matched.kl.mean[1:-1] - bare.kl.mean[1:-1]).max() > 1e-3
    assert matched.kl.mean[-1] == 0
    assert "gains and biases matched" in matched.title


def test_matching_is_for_post_norm_streams_and_alone() -> None:
    with pytest.raises(UsageError, match="for post-norm streams"):
        look(case("gpt2"), affine_match=True)
    with pytest.raises(UsageError, match="give one"):
        look(case("bert"), affine_match=True, translators="x.pt")
    with pytest.raises(TypeError, match="unexpected keyword argument 'afine'"):
        look(case("gpt2"), afine=True)


@pytest.mark.parametrize("name", ["user_post_norm", "bart"])
def test_nothing_written_behind_norms_without_gains(name: str) -> None:
    """T-L6, post-norm: the norm of what is normalised already is itself, but for an epsilon and rounding."""
    module = zoo.build(name).module
    silent = ("out_proj", "linear2", "fc2")
    for path, own in module.named_modules():
        if isinstance(own, torch.nn.LayerNorm):
            own.weight.data.fill_(1)
            own.bias.data.zero_()
            own.eps = 1e-12
        elif path.endswith(silent):
            for parameter in own.parameters(recurse=False):
                parameter.data.zero_()
    result = logit_lens(module, tokens=torch.arange(40).reshape(4, 10), progress=False)
    first = 0 if name == "bart" else 1  # where the embedding has a norm, all states are alike; else all behind one
    assert result.kl.mean[first:].max() < 1e-7
    assert np.abs(result.delta_log_probability.mean[first:]).max() < 1e-5


@pytest.mark.parametrize("name", ["llama", "user_post_norm", "gemma2", "gptj", "granite", "t5", "bart"])
def test_before_any_training_it_is_the_logit_lens(name: str) -> None:
    """T-L5: translators of zeros, to the last bit."""
    found = case(name)
    source = source_of(found.module, inputs=found.inputs)
    steps, width = len(source.stream.steps), source.stream.d_model
    lens = train_lens(source, kind="bias", progress=False)
    nothing = replace(lens, matrix=torch.zeros(steps, width, width), bias=torch.zeros(steps, width))
    plainly, tuned = (logit_lens(source, translators=given, progress=False) for given in (None, nothing))
    for metric, summary in plainly.metrics.items():
        np.testing.assert_array_equal(tuned.metrics[metric].mean, summary.mean)


@pytest.mark.parametrize("name", ["llama", "user_post_norm", "gemma2", "gptj", "granite", "t5", "bart"])
def test_training_lowers_every_state(name: str) -> None:
    """T-L5, on the tokens that were trained on and those held out alike: all of them are looked at."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, 97, (8, 12), generator=generator)
    module = zoo.build(name).module
    lens = train_lens(module, kind="kl", start="zero", steps=40, step_tokens=64, tokens=ids, progress=False)
    source = source_of(module, tokens=ids)
    blocks = list(source.blocks())
    head = head_of(source, blocks[0])
    last = len(source.stream.steps)
    for k in range(last):
        before, after = 0.0, 0.0
        for block in blocks:
            final = head.logits(block.states[last]).log_softmax(-1)
            for tuned in (False, True):
                state = lens.translate(k, block.states[k]) if tuned else block.states[k]
                kl = float((final.exp() * (final - head.logits(state).log_softmax(-1))).sum())
                before, after = (before, after + kl) if tuned else (before + kl, after)
        assert after < before, k
