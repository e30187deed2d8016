"""The logit lens against plain loops over tokens and states, and the identities that it has to keep."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import streamlens as sl
from fixtures import zoo
from streamlens.analyses.lens.door import LensResult, logit_lens
from streamlens.analyses.lens.head import NEAREST
from streamlens.analyses.lens.metrics import METRICS
from streamlens.analyses.lens.tally import prediction_depth
from streamlens.analyses.source import source_of, target_ids
from streamlens.block import Block
from streamlens.calling import invoke
from streamlens.edits import run_from
from streamlens.errors import MissingDataError, UsageError
from streamlens.observation import tokens
from tests.conftest import Case, case, taken

NAMES = [
    "gpt2", "llama", "bert", "user_post_norm", "gemma2", "gptj", "granite", "t5", "bart", "cohere", "nanogpt",
]  # fmt: skip
KS = (1, 5, 10)


def look(found: Case, **options: Any) -> LensResult:
    return logit_lens(found.module, inputs=found.inputs, progress=False, **options)


def plain(found: Case) -> tuple[dict[str, Tensor], Tensor, Block]:
    """All metrics by name, each (state, token) float64, by a loop over tokens and the model's own head; the tops."""
    source = source_of(found.module, inputs=found.inputs)
    block = next(source.blocks())
    docs, positions = block.shape
    targets = target_ids(source, block)
    logits = []
    for state in block.states:
        with torch.no_grad():
            out = run_from(
                found.module, found.anatomy, len(block.states) - 1, state.reshape(docs, positions, -1), found.inputs
            )
        logits.append(tokens(out, source.stream, docs, positions).flatten(0, 1).double())
    names = [*METRICS, *(f"overlap_{k}" for k in KS), "jsd"]
    values = {name: torch.full((len(logits), len(targets)), torch.nan, dtype=torch.float64) for name in names}
    for s, z in enumerate(logits):
        for t in range(len(targets)):
            for name, value in _one(logits[-1][t], z[t], int(targets[t])).items():
                values[name][s, t] = value
    return values, torch.stack([z.argmax(-1) for z in logits]), block


def _one(final: Tensor, lens: Tensor, target: int) -> dict[str, float]:
    log_p, log_q = final.log_softmax(0), lens.log_softmax(0)
    p, q = log_p.exp(), log_q.exp()
    middle = (p + q) / 2
    found = {
        "kl": float((p * (log_p - log_q)).sum()),
        "entropy": float(-(q * log_q).sum()),
        "top1_rank": float((lens > lens[final.argmax()]).sum()),
        "top_probability": float(q.max()),
        "jsd": float(-(middle * middle.log()).sum() + (p * log_p).sum() / 2 + (q * log_q).sum() / 2),
    }
    if target >= 0:
        found["cross_entropy"] = float(-log_q[target])
        found["target_rank"] = float((lens > lens[target]).sum())
    for k in KS:
        found[f"overlap_{k}"] = len(set(lens.topk(k).indices.tolist()) & set(final.topk(k).indices.tolist())) / k
    return found


@pytest.mark.parametrize("name", NAMES)
def test_every_metric_equals_a_plain_loop(name: str) -> None:
    found = case(name)
    values, tops, block = plain(found)
    result = look(found, jsd=True)
    later = block.position > 0
    for metric, expected in values.items():
        summary = result.metrics[metric]
        torch.testing.assert_close(
            torch.from_numpy(summary.mean), expected[:, later].nanmean(1), rtol=1e-4, atol=2e-5, msg=metric
        )
        torch.testing.assert_close(torch.from_numpy(summary.all_positions), expected.nanmean(1), rtol=1e-4, atol=2e-5)
    for metric in ("target_rank", "top1_rank"):
        median = result.metrics[metric].median
        assert median is not None
        row = np.sort(values[metric][:, later].numpy(), axis=1)
        row = row[:, ~np.isnan(row[0])]
        np.testing.assert_array_equal(median, row[:, (row.shape[1] - 1) // 2])
    depth = [
        next(s for s in range(len(tops)) if bool((tops[s:, t] == tops[-1, t]).all())) for t in range(tops.shape[1])
    ]
    counts = torch.bincount(torch.tensor(depth)[later], minlength=len(tops))
    assert result.depth.tolist() == counts.tolist()
    assert result.depth_all_positions.sum() == tops.shape[1]
    assert result.mean_depth == pytest.approx(float(torch.tensor(depth)[later].double().mean()))


@pytest.mark.parametrize("name", NAMES)
def test_the_last_state_is_the_model(name: str) -> None:
    """Its divergence from itself is 0 exactly; all else is that of the model's own output."""
    found = case(name)
    result = look(found)
    assert result.kl.mean[-1] == 0.0
    source = source_of(found.module, inputs=found.inputs)
    block = next(source.blocks())
    with torch.no_grad():
        out = invoke(found.module, found.inputs)
    logits = tokens(out, source.stream, *block.shape).flatten(0, 1)
    targets = target_ids(source, block)
    kept = (targets >= 0) & (block.position > 0)
    own = torch.nn.functional.cross_entropy(logits[kept].double(), targets[kept])
    assert result.cross_entropy.mean[-1] == pytest.approx(float(own), rel=1e-5)
    log_p = logits[block.position > 0].double().log_softmax(-1)
    assert result.entropy.mean[-1] == pytest.approx(float(-(log_p.exp() * log_p).sum(-1).mean()), rel=1e-5)
    assert result.metrics["top_probability"].mean[-1] == pytest.approx(
        float(log_p.max(-1).values.exp().mean()), rel=1e-5
    )
    rank = (logits[kept] > logits[kept].gather(1, targets[kept, None])).sum(1).double().mean()
    assert result.metrics["target_rank"].mean[-1] == pytest.approx(float(rank))


def test_the_size_of_a_chunk_does_not_matter() -> None:
    found = case("gemma2")
    whole, cut = look(found, chunk_tokens=1000), look(found, chunk_tokens=3)
    for name, summary in whole.metrics.items():
        np.testing.assert_allclose(cut.metrics[name].mean, summary.mean, rtol=1e-5, atol=1e-6)
    assert (cut.depth == whole.depth).all()


def test_nothing_written_and_every_state_says_the_same() -> None:
    module = zoo.build("nanogpt").module
    for name, parameter in module.named_parameters():
        if "c_proj" in name:
            parameter.data.zero_()
    result = logit_lens(module, tokens=torch.arange(40).reshape(4, 10), progress=False)
    assert (result.kl.mean == 0).all()
    assert len(set(result.entropy.mean)) == len(set(result.cross_entropy.mean)) == 1
    assert (result.delta_log_probability.mean == 0).all()
    assert result.depth[0] == result.depth.sum()


def test_subset_of_states_and_its_steps() -> None:
    found = case("gpt2")
    whole, some = look(found), look(found, states=[0, -5], top_k=[3])
    assert some.states.tolist() == [0, 2, 6]
    assert some.labels == ("x_0", "0_mlp_out", "2_mlp_out")
    np.testing.assert_array_equal(some.kl.mean, whole.kl.mean[[0, 2, 6]])
    steps = whole.delta_log_probability.mean
    np.testing.assert_allclose(some.delta_log_probability.mean, [steps[:2].sum(), steps[2:].sum()])


def test_prediction_depth_counts_from_the_last_change() -> None:
    top = torch.tensor([[1, 1, 2, 3], [2, 1, 2, 1], [1, 1, 2, 3], [1, 1, 3, 3]])
    assert prediction_depth(top).tolist() == [2, 0, 3, 2]


def test_bfloat16_products_report_their_error() -> None:
    found = case("llama")
    exact, low = look(found), look(found, dtype="bf16")
    assert exact.precision is None
    assert low.precision is not None
    assert 0 < low.precision["kl_error_mean"] <= low.precision["kl_error_max"] < 0.2
    difference = np.abs(low.kl.mean - exact.kl.mean).max()
    assert 0 < difference <= low.precision["kl_error_max"]
    assert low.kl.mean[-1] == 0.0


@pytest.mark.parametrize("name", ["gpt2", "user_post_norm", "t5"])
def test_a_file_gives_the_same_as_the_live_model(name: str, tmp_path: Path) -> None:
    found = case(name)
    live = look(found)
    side = {"streams": ["decoder"]} if name == "t5" else {}
    with taken(found, tmp_path / "a.h5", **side) as capture:
        filed = logit_lens(capture, model=sl.load(found.module), progress=False)
        compact_path = tmp_path / "b.h5"
    with taken(found, compact_path, compact=True, **side) as compact:
        replayed = logit_lens(compact, model=sl.load(found.module), progress=False)
    for metric, summary in live.metrics.items():
        np.testing.assert_allclose(filed.metrics[metric].mean, summary.mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(replayed.metrics[metric].mean, filed.metrics[metric].mean)
    assert filed.depth.tolist() == live.depth.tolist()
    assert filed.grid is not None
    assert live.grid is not None
    assert (filed.grid.top == live.grid.top).all()


class TestGrid:
    def test_holds_what_the_head_says(self) -> None:
        found = case("gpt2")
        values, tops, block = plain(found)
        grid = look(found, grid_doc=2, grid_positions=[1, 4, 99]).grid
        assert grid is not None
        place = [int(torch.nonzero((block.doc == 2) & (block.position == p))[0, 0]) for p in (1, 4)]
        assert grid.position.tolist() == [1, 4]
        assert grid.ids.tolist() == block.ids[place].tolist()
        assert grid.targets.tolist() == block.ids[[p + 1 for p in place]].tolist()
        assert grid.top.tolist() == tops[:, place].tolist()
        np.testing.assert_allclose(grid.probability, values["top_probability"][:, place], rtol=1e-5)
        assert len(grid.rows()) == 7 * 2
        assert grid.rows()[0]["token"] == str(int(grid.ids[0]))

    def test_a_document_that_is_not_there(self) -> None:
        with pytest.raises(UsageError, match="documents 0 to 2"):
            look(case("gpt2"), grid_doc=7)

    def test_can_be_left_out(self) -> None:
        result = look(case("gpt2"), grid=False)
        assert result.grid is None
        with pytest.raises(UsageError, match="grid=True"):
            result.plot_grid()


def test_an_encoder_is_labelled_for_what_it_is() -> None:
    result = look(case("bert_model"))
    assert result.head == NEAREST
    assert result.title.startswith("nearest-token lens (no head")


def test_no_vocabulary_at_all() -> None:
    with pytest.raises(MissingDataError, match="needs a vocabulary"):
        look(case("vit"))


def test_a_model_that_takes_embeddings_has_no_targets(tmp_path: Path) -> None:
    class Headed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True, norm_first=True)
            self.body = nn.TransformerEncoder(layer, 2, nn.LayerNorm(32), enable_nested_tensor=False)
            self.unembed = nn.Linear(32, 50)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.unembed(self.body(x))
            return out

    module, inputs = Headed().eval(), torch.randn(3, 7, 32)
    result = logit_lens(module, inputs=inputs, progress=False)
    assert np.isnan(result.cross_entropy.mean).all()
    assert np.isfinite(result.kl.mean).all()
    assert result.kl.mean[-1] == 0
    result.save(tmp_path / "a.svg")
    json.dumps(result.rows())
    with (
        sl.capture(module, inputs=inputs, out=tmp_path / "a.h5", progress=False) as capture,
        pytest.raises(MissingDataError, match="not token ids"),
    ):
        logit_lens(capture, model=sl.load(module), progress=False)


def test_rows_plots_and_page(tmp_path: Path) -> None:
    result = look(case("gpt2"))
    rows = result.rows()
    assert [r["label"] for r in rows][:3] == ["x_0", "0_attn_out", "0_mlp_out"]
    assert {"kl", "kl_low", "kl_median", "target_rank", "overlap_10", "delta_log_probability"} <= set(rows[0])
    assert rows[2]["delta_log_probability"] == result.delta_log_probability.mean[1]
    assert sum(r["depth_share"] for r in rows) == pytest.approx(1)
    for name in ("a.png", "a.csv"):
        result.save(tmp_path / name)
    assert result.grid is not None
    result.grid.save(tmp_path / "grid.png")
    assert "<svg" in result._repr_html_()
