"""Positional persistence: against plain loops, planted nets, exact identities, and data without any position."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from fixtures.planted_position import PositionCarrier, UniformAverage
from streamlens.analyses.frozen import stream_norms
from streamlens.analyses.position import sums as position_sums
from streamlens.analyses.position.answer import PositionResult
from streamlens.analyses.position.door import positional_persistence, result_of
from streamlens.analyses.position.energies import Split, null_band, origin_shares, relative_norm, split
from streamlens.analyses.position.sums import FOLDS, Folds, PositionSums, sums_of
from streamlens.analyses.source import Source, source_of
from streamlens.analyses.transport import factors_of, transported
from streamlens.errors import MissingDataError, UsageError
from tests.conftest import case, taken

ZOO = ("gpt2", "llama", "bert", "user_post_norm", "gemma2", "gptj", "granite", "t5", "bart", "transformer_pre")
SCALED = ("deepnorm", "scaled_skip_parameter", "bloom")


def stream_of(name: str) -> str | None:
    return "decoder" if name in ("t5", "bart") or name.startswith("transformer") else None


def opened(name: str, batch_tokens: int = 1024) -> Source:
    found = case(name)
    return source_of(found.module, inputs=found.inputs, stream=stream_of(name), batch_tokens=batch_tokens)


def sums_on(data: Tensor, *, first: int = 1) -> PositionSums:
    """Sums of one state, fed document by document."""
    found = PositionSums(case("gpt2").anatomy.stream(), data.shape[1], first=first, origins=False, states=[0])
    for number, row in enumerate(data):
        fold = torch.tensor([number * FOLDS // len(data)])
        found.count(fold)
        found.add_state(0, row[None], fold)
    return found


def dense(data: NDArray[np.float64]) -> dict[str, Any]:
    """The decomposition by plain loops over (doc, position, d_model)."""
    docs, positions, width = data.shape
    mean = np.zeros(width)
    for row in data:
        for vector in row:
            mean += vector / (docs * positions)
    position = np.stack([sum(data[c, t] for c in range(docs)) / docs - mean for t in range(positions)])
    context = np.stack([sum(data[c, t] for t in range(positions)) / positions - mean for c in range(docs)])
    rest = np.zeros_like(data)
    for c in range(docs):
        for t in range(positions):
            rest[c, t] = data[c, t] - mean - position[t] - context[c]
    return {"mean": mean, "position": position, "context": context, "rest": rest}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TestSplit:
    @pytest.mark.parametrize("first", [0, 1])
    def test_equals_plain_loops_and_the_energies_add_up(self, first: int) -> None:
        data = noise(6, 5, 7) + 3 * noise(5, 7, seed=1) + noise(6, 1, 7, seed=2) + 10
        own = split(sums_on(data, first=first), 0)
        counted = data[:, first:].numpy()
        plain = dense(counted)
        docs, positions, _ = counted.shape
        expected = [
            docs * positions * (plain["mean"] ** 2).sum(),
            docs * (plain["position"] ** 2).sum(),
            positions * (plain["context"] ** 2).sum(),
            (plain["rest"] ** 2).sum(),
        ]
        assert [own.mean, own.position, own.context, own.rest] == pytest.approx(expected, rel=1e-10)
        assert own.mean + own.total == pytest.approx((counted**2).sum(), rel=1e-12)
        np.testing.assert_allclose(own.parts.numpy(), plain["position"], atol=1e-12)
        mean_square = expected[1] / (positions - 1) / (expected[3] / ((docs - 1) * (positions - 1)))
        assert own.f_ratio == pytest.approx(mean_square, rel=1e-10)

    def test_a_large_mean_does_not_drown_the_rest(self) -> None:
        data = noise(8, 6, 5) + noise(6, 5, seed=1)
        near, far = split(sums_on(data), 0), split(sums_on(data + 1e4), 0)
        assert far.share == pytest.approx(near.share, rel=1e-6)

    def test_what_was_planted_comes_back(self) -> None:
        """Variances 1 for each of position, context and rest: a third each, and the positional vectors themselves."""
        position, context = noise(40, 30, seed=1), noise(200, 1, 30, seed=2)
        data = 5.0 + position + context + noise(200, 40, 30, seed=3)
        own = split(sums_on(data, first=0), 0)
        assert own.share == pytest.approx(1 / 3, abs=0.02)
        assert own.context / own.total == pytest.approx(1 / 3, abs=0.02)
        truth = position - position.mean(0)
        assert float((own.parts - truth).norm() / truth.norm()) < 0.1

    def test_without_position_the_corrected_share_is_centred_on_zero_and_the_raw_one_is_not(self) -> None:
        shares = [split(sums_on(noise(12, 10, 4, seed=s)), 0) for s in range(200)]
        corrected, raw = np.array([s.share for s in shares]), np.array([s.raw_share for s in shares])
        error = corrected.std() / len(corrected) ** 0.5
        assert abs(corrected.mean()) < 4 * error
        assert raw.mean() > 20 * error

    def test_too_little_to_average_over(self) -> None:
        with pytest.raises(MissingDataError, match="1 documents with 4 positions"):
            split(sums_on(noise(1, 5, 3)), 0)


def correlated(seed: int, docs: int = 16, positions: int = 12, width: int = 6) -> Tensor:
    """No position, but neighbours are alike, dimensions unequal, and documents differ in what they are about."""
    data = noise(docs, positions + 4, width, seed=seed)
    data = sum(data[:, i : i + positions] for i in range(4)) * torch.tensor([9.0, 3.0, 1.0, 1.0, 0.5, 0.1])
    return torch.as_tensor(data + 4 * noise(docs, 1, width, seed=seed + 1000))


class TestNullBand:
    @pytest.mark.parametrize("docs", [4, 16])
    def test_equals_permuted_positions(self, docs: int) -> None:
        data = correlated(7, docs) + 2 * noise(12, 6, seed=3)
        sums = sums_on(data, first=0)
        low, high = null_band(sums, 0, split(sums, 0))
        generator = np.random.default_rng(0)
        drawn = []
        for _ in range(2000):
            order = np.stack([generator.permutation(12) for _ in range(len(data))])
            shuffled = np.take_along_axis(data.numpy(), order[..., None], axis=1)
            means = shuffled.mean(0)
            position = len(data) * ((means - means.mean(0)) ** 2).sum()
            own = split(sums, 0)
            within = own.position + own.rest
            drawn.append((position - (within - position) / (len(data) - 1)) / own.total)
        drawn_low, drawn_high = np.quantile(drawn, [0.025, 0.975])
        width = drawn_high - drawn_low
        assert abs(np.mean(drawn)) < 0.02 * width
        assert low == pytest.approx(drawn_low, abs=0.06 * width)
        assert high == pytest.approx(drawn_high, abs=0.06 * width)

    def test_holds_what_it_promises_without_position(self) -> None:
        inside = 0
        for seed in range(300):
            sums = sums_on(noise(10, 8, 5, seed=seed) * torch.tensor([5.0, 2.0, 1.0, 1.0, 0.2]), first=0)
            own = split(sums, 0)
            low, high = null_band(sums, 0, own)
            inside += low <= own.share <= high
        assert 0.91 <= inside / 300 <= 0.98

    def test_a_sketch_of_a_wide_stream_gives_nearly_the_same(self, monkeypatch: pytest.MonkeyPatch) -> None:
        data = noise(30, 9, 96) * torch.linspace(0.1, 3, 96) + noise(9, 96, seed=1)
        whole = sums_on(data)
        monkeypatch.setattr(position_sums, "WHOLE_WIDTH", 50)
        position_sums.sketch_of.cache_clear()
        try:
            narrow = sums_on(data)
            assert narrow.scatter[0].shape == (96, position_sums.SKETCH_WIDTH)
            exact, rough = null_band(whole, 0, split(whole, 0)), null_band(narrow, 0, split(narrow, 0))
            assert rough[1] - rough[0] == pytest.approx(exact[1] - exact[0], rel=0.25)
            assert relative_norm(narrow, 0, split(narrow, 0)) == pytest.approx(_spectral(data), rel=1e-6)
        finally:
            position_sums.sketch_of.cache_clear()


def _spectral(data: Tensor) -> float:
    """The relative norm from the whole matrices, a row for each document and position."""
    plain = dense(data[:, 1:].numpy())
    docs, positions = data.shape[0], data.shape[1] - 1
    every = [(c, t) for c in range(docs) for t in range(positions)]
    position = np.stack([plain["position"][t] for _, t in every])
    both = np.stack([plain["mean"] + plain["position"][t] + plain["context"][c] for c, t in every])
    return float(np.linalg.norm(position, 2) / np.linalg.norm(both, 2))


def test_relative_norm_equals_the_spectral_norms_of_the_whole_matrices() -> None:
    data = noise(7, 6, 9) + noise(6, 9, seed=1) + 2 * noise(7, 1, 9, seed=2) + 1
    sums = sums_on(data)
    assert relative_norm(sums, 0, split(sums, 0)) == pytest.approx(_spectral(data), rel=1e-9)


class TestOrigin:
    @pytest.mark.parametrize("name", [*ZOO, *SCALED])
    def test_shares_sum_to_one_and_equal_plain_averages_over_two_halves(self, name: str) -> None:
        """Against a plain loop: each term averaged over one half of the documents, the state over the other."""
        source = opened(name)
        blocks = list(source.blocks())
        sums = sums_of(source, blocks)
        numbers = Folds.of(source).numbers
        assert len(numbers) == sums.docs
        even = torch.from_numpy(numbers % 2 == 0)
        norms, factors = stream_norms(source.stream, source.parameters), factors_of(source.stream, source.parameters)
        walks = [list(transported(source.stream, norms, b, factors=factors, dtype=torch.float64)) for b in blocks]
        labels = [label for label, _ in sums.term_names]
        for k in sums.states:
            state = torch.cat([b.states[k].view(*b.shape, -1) for b in blocks])
            np.testing.assert_allclose(split(sums, k).parts.numpy(), _positional(state), atol=1e-5)
            first, second = _positional(state[even]), _positional(state[~even])
            energy = (first * second).sum()
            found = origin_shares(sums, k)
            if energy <= 0:
                assert np.isnan(found).all()
                continue
            size = float(np.abs(found[~np.isnan(found)]).max())
            assert np.nansum(found) == pytest.approx(1.0, abs=1e-4 * max(size, (first**2).sum() / energy))
            for i, summand in enumerate(walks[0][k]):
                if summand.kind == "norm":
                    continue
                whole = torch.cat([w[k][i].vectors.view(*b.shape, -1) for w, b in zip(walks, blocks, strict=True)])
                crossed = (_positional(whole[even]) * second).sum() + (_positional(whole[~even]) * first).sum()
                share = float(crossed / 2 / energy)
                assert found[labels.index(summand.label)] == pytest.approx(share, abs=1e-4 * max(size, 1))

    def test_writes_to_come_have_no_share(self) -> None:
        found = positional_persistence(
            case("gptj").module, tokens=tokens(64, 11, 50), include_first=True, progress=False
        )
        assert found.terms[:3] == ("embed", "0_attn_out", "0_mlp_out")
        assert (found.position_share[2:] > found.null_high[2:]).all()  # a causal mask is enough
        assert np.isnan(found.origin[1, 3:]).all()
        assert np.isnan(found.origin[2, 5:]).all()
        assert not np.isnan(found.origin[2, :5]).any()  # both writes of a layer arrive together

    def test_noise_of_averaging_brings_no_share(self) -> None:
        """Position carried by a small table, buried in tokens: averages over few documents are mostly noise.

        The truth is known: the table carries all of it, and the tokens, which are all that the noise is of, nothing.
        """
        shares = []
        for seed in range(60):
            net = PositionCarrier(layers=1)
            with torch.no_grad():
                net.pos_embed.weight.mul_(0.3)
            ids = torch.randint(0, 40, (12, 20), generator=torch.Generator().manual_seed(seed))
            source = source_of(net, tokens=ids)
            sums = sums_of(source, source.blocks())
            assert split(sums, 0).raw_share > 1.5 * split(sums, 0).share  # a third of the average or more is noise
            shares.append(origin_shares(sums, 0)[:2])
        embed, table = np.array(shares).T
        assert abs(np.mean(embed)) < 4 * np.std(embed) / len(embed) ** 0.5
        assert abs(np.mean(table) - 1) < 4 * np.std(table) / len(table) ** 0.5

    def test_within_the_null_band_nothing_is_said(self) -> None:
        """After the eraser only tokens are left, of which an average over documents always keeps something."""
        found = positional_persistence(PositionCarrier(eraser=1), tokens=tokens(), progress=False)
        after = found.states.index("1_mlp_out")
        below = found.position_share <= found.null_high
        assert not below[:after].any()
        assert below[after:].all()
        for values in (found.origin, found.carried, found.share_of("mlp")):
            assert np.isnan(values[after:]).all()
        assert not np.isnan(found.carried[:after]).any()
        assert "the last state above its null band" in found.reading
        assert f"x_{after - 1}" in found.reading

    def test_the_long_table_names_the_sublayer_that_takes_position_away(self) -> None:
        """Half an eraser: the MLP of layer 1 writes minus a half of the position that it reads."""
        net = PositionCarrier(eraser=1)
        with torch.no_grad():
            net.layers[1].mlp[2].weight.mul_(0.5)  # type: ignore[index, union-attr]
        found = positional_persistence(net, tokens=tokens(400), progress=False)
        rows = found.origins.rows()
        assert {"state", "label", "term", "kind", "share"} == set(rows[0])
        last = {row["term"]: row["share"] for row in rows if row["state"] == len(found.states) - 1}
        assert sum(last.values()) == pytest.approx(1, abs=1e-4)
        # p - p/2 is left: of p/2 the table brought p and the eraser -p/2.
        assert last["pos_embed"] == pytest.approx(2.0, abs=0.1)
        assert last["1_mlp_out"] == pytest.approx(-1.0, abs=0.1)
        assert min((share, term) for term, share in last.items())[1] == "1_mlp_out"
        assert len([r for r in rows if r["state"] == 0]) == 2

    def test_figures_show_what_is_taken_away(self) -> None:
        net = PositionCarrier(eraser=1)
        with torch.no_grad():
            net.layers[1].mlp[2].weight.mul_(0.5)  # type: ignore[index, union-attr]
        found = positional_persistence(net, tokens=tokens(), progress=False)
        heights = [bar.get_height() for bar in found.plot_origin().patches]  # type: ignore[attr-defined]
        assert min(heights) < -0.5
        image = found.origins.plot().collections[0]
        drawn = np.ma.filled(image.get_array().astype(float), np.nan)  # type: ignore[union-attr]
        np.testing.assert_array_equal(drawn.reshape(found.origin.T.shape), found.origin.T)


def _positional(states: Tensor) -> Any:
    means = states[:, 1:].double().mean(0)
    return (means - means.mean(0)).numpy()


@pytest.mark.parametrize("name", [*ZOO, *SCALED])
def test_file_and_live_run_agree_and_halves_merge(name: str, tmp_path: Path) -> None:
    live = opened(name, batch_tokens=11)
    only = {} if stream_of(name) is None else {"streams": [stream_of(name)]}
    with taken(case(name), tmp_path / "run.h5", **only) as capture:
        stored = positional_persistence(capture, stream=stream_of(name), progress=False)
    assert_same(stored, positional_persistence(live, progress=False))
    blocks = list(live.blocks())
    first, second = sums_of(live, blocks[:1]), sums_of(live, blocks[1:])  # both know the groups of the whole
    first.merge(second)
    assert_same(result_of(first, live.description), result_of(sums_of(live, blocks), live.description))


def assert_same(first: PositionResult, second: PositionResult) -> None:
    for field in dataclasses.fields(first):
        one, two = getattr(first, field.name), getattr(second, field.name)
        if isinstance(one, np.ndarray | float):
            np.testing.assert_allclose(one, two, rtol=1e-6, atol=1e-7, err_msg=field.name)
        elif field.name != "title":
            assert one == two, field.name


def tokens(docs: int = 48, positions: int = 20, vocab: int = 40) -> Tensor:
    return torch.randint(0, vocab, (docs, positions), generator=torch.Generator().manual_seed(5))


class TestPlanted:
    def test_the_skip_carries_position_where_no_write_touches_it(self) -> None:
        found = positional_persistence(PositionCarrier(), tokens=tokens(), progress=False)
        assert found.position_embedding == "pos_embed"
        np.testing.assert_allclose(found.retention, 1.0, atol=1e-9)
        carried = found.origin[:, found.terms.index("pos_embed")]
        assert (carried > 0.8).all()
        assert (found.position_share > found.null_high).all()
        assert found.subspace_overlap[0] > 0.4 > found.overlap_chance

    @pytest.mark.parametrize("layer", [0, 2])
    def test_the_eraser_is_found(self, layer: int) -> None:
        found = positional_persistence(PositionCarrier(eraser=layer), tokens=tokens(), progress=False)
        after = found.states.index(f"{layer}_mlp_out")
        np.testing.assert_allclose(found.retention[:after], 1.0, atol=1e-9)
        np.testing.assert_allclose(found.retention[after:], 0.0, atol=1e-9)
        assert (found.position_share[after:] < found.null_high[after:]).all()
        assert (found.low[:after] > found.null_high[:after]).all()

    def test_a_model_without_positions_is_an_answer_not_an_error(self) -> None:
        ids = tokens(vocab=50)[:, :11]
        found = positional_persistence(case("llama").module, tokens=ids, progress=False)
        assert found.position_embedding is None
        assert found.position_share[0] < found.null_high[0]
        assert "no position embedding" in found.reading

    def test_position_in_the_size_of_a_write_is_not_in_its_mean(self) -> None:
        source = source_of(UniformAverage(), tokens=tokens(3000, 16), batch_tokens=16_000)
        square = torch.zeros(16, dtype=torch.float64)
        for block in source.blocks():
            square += block.writes[0].view(*block.shape, -1).double().square().sum((0, 2))
        flat = square * torch.arange(1, 17)
        assert float((flat / flat.mean() - 1).abs().max()) < 0.1  # each is known to a few percent
        assert abs(np.polyfit(np.log(np.arange(1, 17)), np.log(square.numpy()), 1)[0] + 1) < 0.02
        found = positional_persistence(source, progress=False)
        assert (found.position_share < 2 * found.null_high).all()


def test_a_model_in_bfloat16_adds_up_to_its_own_roundings() -> None:
    module = case("gpt2", torch.bfloat16).module
    found = positional_persistence(module, tokens=tokens(24, 11, 50), progress=False)
    assert (found.position_share > found.null_high).all()
    np.testing.assert_allclose(np.nansum(found.origin, axis=1), 1.0, atol=0.05)
    wide = positional_persistence(case("gpt2").module, tokens=tokens(24, 11, 50), progress=False)
    np.testing.assert_allclose(found.position_share, wide.position_share, atol=0.02)


class TestOptions:
    def test_position_0_counts_on_request(self) -> None:
        with_first = positional_persistence(opened("gpt2"), include_first=True, progress=False)
        without = positional_persistence(opened("gpt2"), progress=False)
        np.testing.assert_allclose(with_first.position_share, without.position_share_all)
        assert with_first.positions == without.positions + 1
        assert without.position_vectors.shape[1] == without.positions

    def test_documents_of_unequal_length_are_cut_and_short_ones_counted(self) -> None:
        rows = [list(range(10)), list(range(3, 9)), list(range(20, 28)), list(range(5))]
        found = positional_persistence(case("gpt2").module, tokens=rows, window=None, positions=6, progress=False)
        assert (found.documents, found.documents_left_out) == (3, 1)

    def test_a_short_first_document_does_not_decide_how_many_positions_count(self) -> None:
        rows = [[1, 2, 3]] + [[(7 * i + j) % 50 for j in range(9)] for i in range(12)]
        found = positional_persistence(case("gpt2").module, tokens=rows, window=None, progress=False)
        assert (found.positions, found.documents, found.documents_left_out) == (8, 12, 1)
        assert "12 x 8 positions" in found.title
        assert found.scope == "positions 1 to 8 of 12 documents or windows; 1 shorter ones left out"

    def test_documents_that_are_too_short_are_told_what_helps(self) -> None:
        rows = [[1, 2]] * 9 + [[(7 * i + j) % 50 for j in range(9)] for i in range(6)]
        with pytest.raises(MissingDataError, match="ask for more positions"):
            positional_persistence(case("gpt2").module, tokens=rows, window=None, progress=False)
        found = positional_persistence(case("gpt2").module, tokens=rows, window=None, positions=9, progress=False)
        assert (found.documents, found.documents_left_out) == (6, 9)

    def test_mistakes(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="at least 3"):
            positional_persistence(opened("gpt2"), positions=2, progress=False)
        with pytest.raises(MissingDataError, match="has 99 positions"):
            positional_persistence(opened("gpt2"), positions=99, progress=False)
        with (
            taken(case("gpt2"), tmp_path / "some.h5", positions=[0, 2, 3]) as capture,
            pytest.raises(MissingDataError, match="without --positions"),
        ):
            positional_persistence(capture, progress=False)


def test_own_split_is_nan_where_nothing_varies() -> None:
    still = Split(1.0, 0.0, 0.0, 0.0, 3, 4, torch.zeros(4, 2))
    assert np.isnan([still.share, still.raw_share, still.f_ratio]).all()
