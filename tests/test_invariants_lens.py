"""Laws of the lenses: raw divergences in float64, frozen against recomputed norms, planted truth, matched gains."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fixtures import planted, zoo
from streamlens.analyses.lens.door import logit_lens
from streamlens.analyses.lens.head import head_of
from streamlens.analyses.lens.metrics import METRICS, Workspace, Yardstick
from streamlens.analyses.lens.tuned import train_lens
from streamlens.analyses.lens.writes import write_lens
from streamlens.analyses.source import source_of
from streamlens.errors import UsageError
from tests.conftest import case
from tests.test_lens import KS, _one, look, plain
from tests.test_lens_kernel import TestKernel


def test_the_kernel_in_float64() -> None:
    head, first, second, targets = TestKernel().setting()
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
    head, first, other, targets = TestKernel().setting()
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


@pytest.mark.parametrize("name", ["gpt2", "t5"])
@pytest.mark.parametrize("rows", [1, 1 << 30])
def test_rows_and_chunks_do_not_matter(name: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = look(case(name))
    monkeypatch.setattr("streamlens.analyses.lens.metrics.CACHE_BYTES", rows)
    cut = look(case(name), chunk_tokens=1 if rows == 1 else 3)
    for metric, summary in whole.metrics.items():
        np.testing.assert_allclose(cut.metrics[metric].mean, summary.mean, rtol=1e-5, atol=1e-6)


def test_gains_are_those_of_the_models_own_logits() -> None:
    """Each step's gain in log p(target), by the model's own head run on both states."""
    found = case("gemma2")
    values, _, block = plain(found)
    log_p = -values["cross_entropy"]
    gained = (log_p[1:] - log_p[:-1])[:, block.position > 0].nanmean(1)
    np.testing.assert_allclose(look(found).delta_log_probability.mean, gained, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", ["raw_parameters", "llama", "gpt2"])
def test_a_running_sum_of_writes_is_a_state_seen_through_the_last_norm(name: str) -> None:
    """Without a final norm it is the logit lens; with an RMS norm it is off by the ratio of the two scales, exactly."""
    found = case(name)
    source = source_of(found.module, inputs=found.inputs)
    block = next(iter(source.blocks()))
    rows = torch.nonzero((block.doc == 0) & (block.position < 6))[:, 0]
    result, head = write_lens(source, positions=range(6)), head_of(source, block)
    known = result.targets >= 0
    summed, last = np.zeros(len(rows)), len(source.stream.steps)
    parts = dict(zip(result.labels, result.target_logit, strict=True))
    summed = sum((parts[p.label] for p in source.stream.parts), summed)
    scale = [1 / block.states[k][rows].double().square().mean(-1).sqrt() for k in range(last + 1)]
    for k in range(last + 1):
        if k:
            for s in source.stream.steps[k - 1].sublayers:
                summed = summed + parts[source.stream.sublayers[s].label]
        with torch.no_grad():
            logits = head.logits(block.states[k][rows]).double()
        logits = logits - logits.mean(-1, keepdim=True)
        stream = logits.gather(1, torch.from_numpy(result.targets).clamp_min(0)[:, None])[:, 0].numpy()
        if name == "raw_parameters":
            biases = sum((v for label, v in parts.items() if label.startswith("bias:")), np.zeros(len(rows)))
            np.testing.assert_allclose((summed + biases)[known], stream[known], atol=1e-4)
        elif name == "llama":
            rescaled = summed * (scale[k] / scale[last]).numpy()
            np.testing.assert_allclose(rescaled[known], stream[known], rtol=2e-3, atol=2e-4)
        if name != "raw_parameters" and k < last:
            assert np.abs(summed - stream)[known].max() > 0.02, "another thing altogether"


@pytest.mark.parametrize("name", ["gptj", "gemma2", "granite"])
def test_nothing_written_and_every_state_says_the_same(name: str) -> None:
    module = zoo.build(name).module
    silent = {"gptj": ("out_proj", "fc_out"), "gemma2": ("post_",), "granite": ("o_proj", "down_proj")}[name]
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


@pytest.mark.parametrize("name", ["user_post_norm", "gemma2"])
def test_training_lowers_every_state(name: str) -> None:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, 97, (8, 12), generator=generator)
    module = zoo.build(name).module
    lens = train_lens(module, kind="kl", start="bias", steps=40, step_tokens=64, tokens=ids, progress=False)
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
