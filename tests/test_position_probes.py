"""Probes for position: against scikit-learn's own ridge, planted nets, and models in which there is nothing to find."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge as SklearnRidge
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

import streamlens as sl
from fixtures.planted_position import PositionCarrier
from streamlens.analyses.position.probes import ProbeResult, control_labels, position_probes
from streamlens.analyses.position.sample import PENALTIES, Halves, Sample, fit_ridge, r_squared, sample_of, score
from streamlens.analyses.source import source_of
from streamlens.errors import MissingDataError, UsageError
from tests.conftest import case, taken


def ids(docs: int = 40, positions: int = 20, vocab: int = 40, seed: int = 0) -> Tensor:
    return torch.randint(0, vocab, (docs, positions), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("samples", "width"), [(180, 20), (60, 90)])
def test_ridge_equals_scikit_learns_with_the_penalty_chosen_in_the_same_folds(samples: int, width: int) -> None:
    generator = np.random.default_rng(0)
    features = (generator.normal(size=(samples, width)) * generator.uniform(0.1, 9, width) + 3).astype(np.float32)
    labels = np.stack([features @ generator.normal(size=width), generator.normal(size=samples)], axis=1) + 5.0
    halves = Halves.of(np.arange(samples) // 5, seed=0)
    found = fit_ridge(features, labels, halves)
    for column in range(2):
        y = labels[:, column]
        errors = []
        for penalty in PENALTIES:
            error = 0.0
            for inner, outer in halves.folds:
                scaler = StandardScaler().fit(features[halves.train[inner]])
                model = SklearnRidge(alpha=penalty, solver="svd")
                model.fit(scaler.transform(features[halves.train[inner]]), y[halves.train[inner]])
                guess = model.predict(scaler.transform(features[halves.train[outer]]))
                error += float(((guess - y[halves.train[outer]]) ** 2).sum())
            errors.append(error)
        best = PENALTIES[int(np.argmin(errors))]
        assert found.penalties[column] == best
        scaler = StandardScaler().fit(features[halves.train])
        model = SklearnRidge(alpha=best, solver="svd").fit(scaler.transform(features[halves.train]), y[halves.train])
        expected = model.predict(scaler.transform(features[halves.test]))
        np.testing.assert_allclose(found.predict(features[halves.test])[:, column], expected, rtol=1e-3, atol=1e-3)


def test_no_document_is_on_both_sides() -> None:
    groups = np.repeat(np.arange(12), 7)
    halves = Halves.of(groups, seed=3)
    assert not set(groups[halves.train]) & set(groups[halves.test])
    assert len(halves.train) + len(halves.test) == len(groups)
    for inner, outer in halves.folds:
        assert not set(groups[halves.train[inner]]) & set(groups[halves.train[outer]])


def test_score_is_r_squared_with_an_interval_around_it() -> None:
    generator = np.random.default_rng(0)
    truth = generator.normal(size=200)
    guess = truth + 0.5 * generator.normal(size=200)
    value, low, high = score(truth, guess, np.arange(200) // 10)
    assert value == pytest.approx(r_squared(truth, guess))
    assert low < value < high
    assert np.isnan(r_squared(np.ones(3), np.ones(3)))


class OneHot(nn.Module):
    """Positions as unit vectors beside random tokens, one linear layer that adds nothing to them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.pos_embed = nn.Embedding(40, 32), nn.Embedding(20, 32)
        self.mlp = nn.Linear(32, 32)
        with torch.no_grad():
            self.embed.weight[:, :20] = 0.0
            self.pos_embed.weight.copy_(torch.eye(32)[:20])
            self.mlp.weight.mul_(0.01)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids) + self.pos_embed(torch.arange(input_ids.shape[1]))
        return torch.as_tensor(x + self.mlp(x))


class TestKnownAnswers:
    def test_one_hot_positions_are_read_off_perfectly_and_shuffled_ones_not_at_all(self) -> None:
        found = position_probes(OneHot(), tokens=ids(), progress=False)
        assert (found.r_squared > 0.98).all()
        assert (found.accuracy > 0.98).all()
        assert (found.r_squared_shuffled < 0.05).all()

    def test_nothing_is_left_after_the_eraser(self) -> None:
        found = position_probes(PositionCarrier(eraser=1), tokens=ids(), states=[0, 3, 4, 6], progress=False)
        assert (found.low[:2] > 0.3).all()
        assert (found.r_squared[2:] < 0.05).all()
        assert (found.accuracy[:2] > 0.9).all()
        assert (found.accuracy[2:] < 0.35).all()

    def test_the_token_control_is_learnt_where_only_tokens_are(self) -> None:
        """In the planted net tokens have a vector each: a label by kind of token can be learnt by heart there."""
        found = position_probes(PositionCarrier(), tokens=ids(vocab=10), states=[0], progress=False)
        assert found.r_squared_control[0] > 0.9
        assert found.accuracy_control[0] > 0.9
        # Of position, the probe finds what a probe for the tokens does not: neither is 1, so it is their difference.
        assert found.r_squared[0] - 1 < found.selectivity[0] < 0.1
        assert found.rows()[0]["selectivity"] == pytest.approx(found.r_squared[0] - found.r_squared_control[0])

    def test_both_sides_seeing_and_no_positions_tell_nothing_exactly(self) -> None:
        """An encoder without positions: permuted tokens give permuted states, so there is nothing to find."""
        module = case("encoder_pre").module
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(48, 12, 32, generator=generator, dtype=torch.float64)
        order = torch.randperm(12, generator=generator)
        wide = module.double()
        try:
            with torch.no_grad():
                assert float((wide(x)[:, order] - wide(x[:, order])).abs().max()) < 1e-12
        finally:
            module.float()
        found = position_probes(module, inputs=x.float(), progress=False)
        assert (found.r_squared < 0.1).all()
        assert np.isnan(found.r_squared_control).all()  # there are no tokens to learn by heart
        assert np.isnan(found.accuracy_control).all()


def test_control_labels_belong_to_the_kind_of_token() -> None:
    kinds = np.array([4, 9, 4, 4, 9, 7])
    labels = control_labels(kinds, np.arange(6), 0)
    assert labels[0] == labels[2] == labels[3]
    assert labels[1] == labels[4]
    assert set(labels) <= set(range(6))


class TestSample:
    def test_is_bounded_spread_out_and_the_same_for_any_batches(self) -> None:
        found = []
        for batch_tokens in (44, 330):
            source = source_of(case("gpt2").module, tokens=ids(30, 11, 50), batch_tokens=batch_tokens)
            some, sample = sample_of(source, 9, documents=10, tokens=4, include_first=False, seed=0)
            rows = [sample.rows(block) + block.start for block in some.blocks()]
            found.append((torch.cat(rows), sample))
        assert torch.equal(found[0][0], found[1][0])
        sample = found[0][1]
        assert len(sample.position) == 40
        assert set(sample.position) <= set(range(1, 9))
        assert len(np.unique(sample.column(2))) == 10
        assert np.ptp(sample.column(2)) >= 25

    def test_a_short_first_document_does_not_thin_it_out(self) -> None:
        rows = [[1] * 10] + [[(7 * i + j) % 40 for j in range(30)] for i in range(100)]
        found = position_probes(PositionCarrier(), tokens=rows, window=None, states=[0], documents=20, progress=False)
        assert sum(found.tokens) == 20 * 24
        assert "20 of 101 windows" in found.title

    def test_labels_are_those_of_the_rows(self) -> None:
        source = source_of(case("gpt2").module, tokens=ids(8, 11, 50), batch_tokens=44)
        sample = Sample(11, tokens=5)
        for block in source.blocks():
            rows = sample.rows(block)
            assert np.array_equal(sample.labels[-1][1], block.ids[rows])
            assert np.array_equal(sample.labels[-1][0], block.position[rows])


def test_file_and_live_run_agree(tmp_path: Path) -> None:
    from streamlens.recorder.capturing import capture

    module, tokens = PositionCarrier(), ids(24, 12)
    live = position_probes(module, tokens=tokens, progress=False, batch_tokens=36)
    with capture(module, tokens=tokens, out=tmp_path / "run.h5", progress=False) as opened:
        stored = position_probes(opened, progress=False)
    for name in ("r_squared", "low", "high", "r_squared_control", "accuracy", "accuracy_control", "penalty"):
        np.testing.assert_allclose(getattr(stored, name), getattr(live, name), rtol=1e-5, atol=1e-6)
    assert stored.states == live.states == ("x_0", "0_mlp_out", "1_mlp_out", "2_mlp_out")


@pytest.mark.parametrize("name", ["bert", "gptj", "transformer_pre"])
def test_three_documents_are_too_few(name: str, tmp_path: Path) -> None:
    only = {"streams": ["decoder"]} if name == "transformer_pre" else {}
    with taken(case(name), tmp_path / "run.h5", **only) as capture, pytest.raises(MissingDataError, match="too few"):
        position_probes(capture, stream=only.get("streams", [None])[0], progress=False)


def test_a_state_named_twice_is_probed_once() -> None:
    found = position_probes(PositionCarrier(), tokens=ids(), states=[3, 3, 0], progress=False)
    once = position_probes(PositionCarrier(), tokens=ids(), states=[3, 0], progress=False)
    assert found.state_index.tolist() == [3, 0]
    np.testing.assert_array_equal(found.r_squared, once.r_squared)


class TestUntrained:
    def test_the_model_before_its_training_is_probed_alike(self, tmp_path: Path) -> None:
        options: dict[str, Any] = {"tokens": ids(), "states": [0, 6], "progress": False}
        found = position_probes(PositionCarrier(), untrained=PositionCarrier(eraser=1), **options)
        other = position_probes(PositionCarrier(eraser=1), **options)
        np.testing.assert_allclose(found.r_squared_untrained, other.r_squared, rtol=1e-10)
        assert np.isnan(other.r_squared_untrained).all()
        assert [row["r_squared_untrained"] for row in found.rows()] == found.r_squared_untrained.tolist()
        labels = [line.get_label() for line in found.plot().lines]
        assert "control: before training" in labels
        stored = []
        for name, module in (("own", PositionCarrier()), ("untrained", PositionCarrier(eraser=1))):
            sl.capture(module, tokens=ids(), out=tmp_path / f"{name}.h5", progress=False).close()
            stored.append(tmp_path / f"{name}.h5")
        again = position_probes(stored[0], untrained=stored[1], states=[0, 6], progress=False)
        np.testing.assert_allclose(again.r_squared_untrained, other.r_squared, atol=1e-6)

    def test_on_other_tokens_it_is_no_control(self) -> None:
        source = source_of(PositionCarrier(), tokens=ids(seed=1))
        with pytest.raises(UsageError, match="shown other tokens"):
            position_probes(PositionCarrier(), tokens=ids(), untrained=source, progress=False)


def test_mistakes() -> None:
    with pytest.raises(UsageError, match="states 0 to 6, not 7"):
        position_probes(PositionCarrier(), tokens=ids(), states=[7], progress=False)
    with pytest.raises(UsageError, match="bins"):
        position_probes(PositionCarrier(), tokens=ids(), bins=1, progress=False)


def test_table_and_figure(tmp_path: Path) -> None:
    found: ProbeResult = position_probes(PositionCarrier(), tokens=ids(), states=[0, 6], progress=False)
    assert [row["label"] for row in found.rows()] == ["x_0", "2_mlp_out"]
    assert set(found.short_rows()[0]) < set(found.rows()[0])
    assert found.save(tmp_path / "probes.svg").stat().st_size > 1000
    axes = found.plot()
    assert axes.get_xlabel()
    assert axes.get_ylabel()
