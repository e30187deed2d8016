"""Positional persistence of models: origins of the positional part, planted nets, options and mistakes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fixtures.planted_position import PositionCarrier, UniformAverage
from streamlens.analyses.frozen import stream_norms
from streamlens.analyses.position.answer import PositionResult
from streamlens.analyses.position.door import positional_persistence, result_of
from streamlens.analyses.position.energies import origin_shares, split
from streamlens.analyses.position.sums import Folds, sums_of
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
