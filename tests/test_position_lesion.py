"""Lesions of the skip: against forwards written by hand, planted carriers and erasers, and the unchanged model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import streamlens as sl
from fixtures.planted_position import PositionCarrier
from streamlens.analyses.ablation.runs import Runs, Setting
from streamlens.analyses.position.damage import LesionResult
from streamlens.analyses.position.door import positional_persistence
from streamlens.analyses.position.lesion import position_lesion
from streamlens.analyses.position.sample import sample_of
from streamlens.analyses.position.sums import sums_of
from streamlens.analyses.position.theatre import Lesion, Theatre, Tokens
from streamlens.analyses.source import source_of
from streamlens.analyses.transport import factors_of
from streamlens.errors import MissingDataError, UsageError
from tests.conftest import case

PLAIN = ("gpt2", "llama", "bert", "user_post_norm", "gemma2", "gptj", "granite", "deepnorm")
DECODERS = ("t5", "bart", "transformer_pre")


def ids(docs: int = 32, positions: int = 20, vocab: int = 40) -> Tensor:
    return torch.randint(0, vocab, (docs, positions), generator=torch.Generator().manual_seed(0))


def played(module: nn.Module, lesions: list[Lesion], **corpus: Any) -> tuple[list[Tensor], Tensor, Theatre]:
    """Outputs of all lesions on one block, the output of the model as it is, and the sums that were filled."""
    stream, protect_first = corpus.pop("stream", None), corpus.pop("protect_first", False)
    source = source_of(module, stream=stream, **corpus)
    (block,) = source.blocks()
    setting = Setting.of(source, protect_first=protect_first)
    _, labels = sample_of(source, None, documents=99, tokens=2, include_first=False, seed=0)
    sample = Tokens([x.step for x in lesions], labels)
    base = sums_of(source, sample.tapped(iter([block])), origins=False)
    theatre = Theatre(source, setting, lesions, base, sample)
    theatre.prepare(block)
    outputs: list[Tensor] = []
    runs = Runs(setting, block, source.inputs(block))
    with torch.no_grad():
        theatre.play(runs, lambda number, output: outputs.append(output.clone()))
        plain = runs.baseline()
    return outputs, plain, theatre


@pytest.mark.parametrize("name", [*PLAIN, *DECODERS])
def test_a_factor_of_one_changes_no_bit_and_others_do(name: str) -> None:
    found = case(name)
    stream = "decoder" if name in DECODERS else None
    steps = range(len(found.anatomy.stream(stream).steps))
    lesions = [Lesion("scale", s, "", a) for s in steps for a in (1.0, 0.5)]
    outputs, plain, theatre = played(found.module, lesions, inputs=found.inputs, stream=stream)
    for lesion, output in zip(lesions, outputs, strict=True):
        assert torch.equal(output, plain) == (lesion.alpha == 1.0)
    for k in theatre.sums[0].states:
        assert torch.equal(theatre.sums[0].sums[k], theatre.base.sums[k])


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "gptj", "parallel_chain", "scaled_skip_parameter", "inplace_add"])
def test_the_state_after_is_the_scaled_skip_plus_all_its_writes(name: str) -> None:
    """Streams without norms: x_{s+1} = alpha c x_s + the writes, which read the intact state."""
    found = case(name)
    source = source_of(found.module, inputs=found.inputs)
    factors = factors_of(source.stream, source.parameters)
    lesions = [Lesion("scale", s, "", 0.3) for s in range(len(source.stream.steps))]
    _, _, theatre = played(found.module, lesions, inputs=found.inputs)
    (block,) = source.blocks()
    for number, step in enumerate(source.stream.steps):
        expected = 0.3 * factors.skips[number] * block.states[number] + sum(block.writes[s] for s in step.sublayers)
        docs = expected.view(*block.shape, -1).double().sum(0)
        torch.testing.assert_close(theatre.sums[number].sums[number + 1], docs, rtol=1e-5, atol=1e-4)


def by_hand(module: nn.Module, x: Tensor, layer: int, skip: Callable[[Tensor], Tensor]) -> Tensor:
    """Run PyTorch's own encoder with another skip around the attention of one layer."""
    for number, each in enumerate(cast(Any, module).layers):
        branch = each._sa_block(each.norm1(x) if each.norm_first else x, None, None)
        x = (skip(x) if number == layer else x) + branch
        x = x if each.norm_first else each.norm1(x)
        branch = each._ff_block(each.norm2(x) if each.norm_first else x)
        x = x + branch if each.norm_first else each.norm2(x + branch)
    return x


@pytest.mark.parametrize("name", ["encoder_pre", "encoder_post"])
def test_equals_a_forward_written_by_hand(name: str) -> None:
    found = case(name)
    x = cast(Tensor, found.inputs)
    assert not found.anatomy.stream().position_first
    generator = torch.Generator().manual_seed(0)
    basis, other = (torch.linalg.qr(torch.randn(32, 5, generator=generator, dtype=torch.float64)).Q for _ in range(2))
    mean = torch.randn(32, generator=generator, dtype=torch.float64)
    lesions = [
        Lesion("scale", 2, "", 0.25),
        Lesion("position", 2, "", mean=mean, basis=basis),
        Lesion("random", 2, "", mean=mean, basis=other, factor=1.5),
    ]

    def removed(x: Tensor) -> Tensor:
        return torch.as_tensor((x.double() - mean) @ basis @ basis.T)

    def drawn(x: Tensor) -> Tensor:
        return torch.as_tensor(1.5 * (x.double() - mean) @ other @ other.T)

    skips: list[Callable[[Tensor], Tensor]] = [
        lambda x: 0.25 * x,
        lambda x: (x - removed(x)).float(),
        lambda x: (x - drawn(x)).float(),
    ]
    outputs, plain, _ = played(found.module, lesions, inputs=found.inputs)
    with torch.no_grad():
        torch.testing.assert_close(by_hand(found.module, x, 9, lambda x: x), plain, rtol=1e-5, atol=1e-5)
        for skip, output in zip(skips, outputs, strict=True):
            torch.testing.assert_close(output, by_hand(found.module, x, 1, skip), rtol=1e-4, atol=1e-4)


def at(found: LesionResult, label: str, mode: str, alpha: float | None = None) -> int:
    return next(
        i for i, x in enumerate(found.lesions) if x.label == label and x.mode == mode and alpha in (None, x.alpha)
    )


class TestPlanted:
    def test_where_the_skip_is_the_carrier_position_does_not_come_back(self) -> None:
        found = position_lesion(PositionCarrier(), tokens=ids(), skips=["0_attn_out", "1_mlp_out"], progress=False)
        for label in ("0_attn_out", "1_mlp_out"):
            gone, control = at(found, label, "position"), at(found, label, "random")
            later = slice(found.lesions[gone].step + 1, None)
            assert (found.position_share.value[gone, later] < found.null_high[later] + 0.01).all()
            assert (found.position_share.value[control, later] > 0.3 * found.baseline[later]).all()
            assert (found.probe_refitted[gone] < 0.05).all()
            assert (found.probe_refitted[control] > 0.1).all()
            assert found.energy_removed[gone] == pytest.approx(found.energy_removed[control], rel=0.1)

    def test_a_factor_of_zero_leaves_what_the_sublayer_wrote(self) -> None:
        found = position_lesion(PositionCarrier(), tokens=ids(), skips=["1_attn_out"], alphas=[0.0], progress=False)
        assert found.position_share.value[0, -1] < 0.01
        assert found.energy_removed[0] >= 1.0

    def test_without_lesion_all_is_as_before(self) -> None:
        module = PositionCarrier()
        found = position_lesion(module, tokens=ids(), alphas=[1.0], progress=False)
        assert [x.label for x in found.lesions if x.mode == "scale"] == ["0_attn_out", "1_attn_out", "2_attn_out"]
        plain = positional_persistence(module, tokens=ids(), progress=False)
        np.testing.assert_allclose(found.baseline, plain.position_share, atol=1e-12)
        for i, lesion in enumerate(found.lesions):
            if lesion.mode == "scale":
                later = slice(lesion.step + 1, None)
                np.testing.assert_array_equal(found.position_share.value[i, later], found.baseline[later])
                assert np.isnan(found.position_share.value[i, : lesion.step + 1]).all()
                assert found.damage[i] == found.energy_removed[i] == 0.0
                np.testing.assert_array_equal(found.probe_refitted[i], found.probe_baseline[i])
                np.testing.assert_array_equal(found.probe_transferred[i], found.probe_baseline[i])

    def test_loss_rises_with_the_lesion_of_a_trained_model(self) -> None:
        model = sl.load(Path(__file__).parent.parent / "fixtures" / "model.pt")
        found = position_lesion(
            model, window=32, max_tokens=1024, skips=["2_attn_out"], alphas=[0.9, 0.0], progress=False
        )
        assert found.score == "delta_loss"
        assert found.damage[0] < found.damage[1]
        assert found.damage[1] > 0.1
        assert (found.low <= found.damage).all()
        assert (found.damage <= found.high).all()


def test_from_a_file_as_from_the_model(tmp_path: Path) -> None:
    module, tokens = PositionCarrier(), ids(12, 10)
    options: dict[str, Any] = {"skips": ["1_attn_out"], "progress": False}
    live = position_lesion(module, tokens=tokens, batch_tokens=40, **options)
    with sl.capture(module, tokens=tokens, out=tmp_path / "run.h5", progress=False) as capture:
        stored = position_lesion(capture, model=sl.load(module), **options)
    for name in ("probe_refitted", "probe_transferred", "damage", "energy_removed"):
        np.testing.assert_allclose(getattr(stored, name), getattr(live, name), rtol=1e-4, atol=1e-5)
    for one, two in ((stored.position_share, live.position_share), (stored.left, live.left)):
        np.testing.assert_allclose(one.value, two.value, rtol=1e-4, atol=1e-5)


def test_what_was_run_is_what_the_title_says_and_is_spread_over_the_text(tmp_path: Path) -> None:
    """Documents of unequal length, three to a batch: 7 of those that are long enough, from the first to the last."""
    rows = [[i, i + 1, i + 5, i + 2] for i in range(9)] + [[(3 * i + j) % 40 for j in range(12)] for i in range(30)]
    module, options = PositionCarrier(), {"skips": ["1_attn_out"], "positions": 12, "documents": 7, "progress": False}
    live = position_lesion(module, tokens=rows, window=None, batch_tokens=36, **options)  # type: ignore[arg-type]
    assert "7 of 39 windows, 84 tokens, 7 x 11 positions" in live.title
    with sl.capture(module, tokens=rows, window=None, out=tmp_path / "run.h5", progress=False) as capture:
        stored = position_lesion(capture, model=sl.load(module), **options)  # type: ignore[arg-type]
    assert "7 of 39 windows, 84 tokens, 7 x 11 positions" in stored.title
    np.testing.assert_allclose(stored.damage, live.damage, rtol=1e-4, atol=1e-6)
    chosen = [13, 17, 21, 26, 30, 34, 38]
    alone = position_lesion(module, tokens=[rows[i] for i in chosen], window=None, **options)  # type: ignore[arg-type]
    np.testing.assert_allclose(alone.damage, live.damage, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(alone.position_share.value, live.position_share.value, rtol=1e-4, atol=1e-6)


def test_a_model_of_16_bits_says_how_far_off_a_lesion_is() -> None:
    """A skip 100 times as large as the write: what is left of a sum without it is rounding, as much as it says."""
    net = PositionCarrier(layers=1).bfloat16()
    with torch.no_grad():
        net.embed.weight.mul_(100)
        net.layers[0].attn.out.weight.mul_(0.01)  # type: ignore[union-attr, operator]
    lesions = [Lesion("scale", 0, "", 1.0), Lesion("scale", 0, "", 0.0)]
    _, _, theatre = played(net, lesions, tokens=ids(8))
    source = source_of(net, tokens=ids(8))
    (block,) = source.blocks()
    state, write = block.states[0], block.writes[0]
    wrong = (state + (write - state)).float() - write.float()
    assert theatre.rounding[0] == 0.0
    assert theatre.rounding[1] == pytest.approx(float(wrong.norm() / write.float().norm()), rel=0.2)
    assert theatre.rounding[1] > 0.01
    assert played(net.float(), lesions, tokens=ids(8))[2].rounding.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("protect_first", [True, False])
def test_position_0_is_left_alone_on_request(protect_first: bool) -> None:
    lesions = [Lesion("scale", 2, "", 0.0)]
    (output,), plain, _ = played(PositionCarrier(), lesions, tokens=ids(4), protect_first=protect_first)
    assert torch.equal(output[:, 0], plain[:, 0]) == protect_first  # causal: it sees itself alone
    assert not torch.equal(output[:, 1:], plain[:, 1:])


def test_a_model_without_positions_and_without_logits() -> None:
    x = torch.randn(16, 9, 32, generator=torch.Generator().manual_seed(0))
    found = position_lesion(case("encoder_pre").module, inputs=x, alphas=[1.0, 0.5], progress=False)
    assert found.score == "pooled_distance"
    assert (found.baseline < 0.1).all()


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(MissingDataError, match="no sublayer '9_attn_out'"):
        position_lesion(PositionCarrier(), tokens=ids(), skips=["9_attn_out"], progress=False)
    with pytest.raises(UsageError, match="nothing to do"):
        position_lesion(PositionCarrier(), tokens=ids(), skips=[], progress=False)


def test_tables_and_figures(tmp_path: Path) -> None:
    found = position_lesion(PositionCarrier(), tokens=ids(), skips=["1_attn_out"], progress=False)
    assert len(found.rows()) == len(found.lesions) == 6
    assert found.save(tmp_path / "lesion.png").stat().st_size > 1000
    axes = found.plot_scale()
    assert axes.get_xlabel() == "Factor on the skip"
    assert len(found.plot().figure.axes) == 2  # a panel for the skip, and one below it for its factors
    assert {"position_left_last", "position_left_last_low", "position_left_last_over_control"} < set(found.rows()[0])
