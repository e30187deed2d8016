"""The door to the gradient's split: its sums, its intervals, its refusals, and the command."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn
from torch.nn import functional as F

import streamlens as sl
from streamlens.analyses.figures import axes, spread_out, wrapped
from streamlens.analyses.gradient import graph as gradient_graph
from streamlens.analyses.gradient.door import GradientFlow, gradient_flow
from streamlens.analyses.gradient.graph import Graph, graphs, open_graph
from streamlens.analyses.gradient.sequences import sequences_of
from streamlens.analyses.source import source_of
from streamlens.calling import invoke
from streamlens.cli.app import main
from streamlens.errors import AnatomyError, MissingDataError, UsageError
from tests.conftest import case, taken
from tests.test_gradient import DOUBLE, Elementwise, graph_of, length

# ---- the sums and means -------------------------------------------------------------------------------------------


def test_the_numbers_are_those_of_a_plain_loop() -> None:
    found = case("bert", DOUBLE)
    targets: Tensor = found.inputs["input_ids"]  # type: ignore[index]
    graph = graph_of(found, targets=targets)
    gradients = [g.reshape(graph.docs, graph.positions, -1).numpy() for g in graph.gradients()]
    flow = gradient_flow(found.module, inputs=found.inputs, progress=False)
    assert flow.objective == "cross_entropy"
    for positions, found_flow in ((slice(1, None), flow.flow), (slice(None), flow.flow_all)):
        for step in range(4):
            pulled = graph.across(step, torch.from_numpy(gradients[step + 1]).flatten(0, 1)[None])
            skip = pulled.skip[0].reshape(gradients[0].shape).numpy()
            branch = graph.through(step, pulled.writes[step])[0].reshape(gradients[0].shape).numpy()
            shares, ratios, cosines, norms, gains = [], [], [], [], []
            for doc in range(graph.docs):
                g, s, b, after = (
                    t[doc, positions].ravel() for t in (gradients[step], skip, branch, gradients[step + 1])
                )
                shares.append(s @ g / (g @ g))
                ratios.append(np.linalg.norm(b) / np.linalg.norm(s))
                cosines.append(s @ b / np.linalg.norm(s) / np.linalg.norm(b))
                norms.append(np.linalg.norm(g) / np.linalg.norm(gradients[-1][doc, positions]))
                gains.append(np.linalg.norm(s) / np.linalg.norm(after))
            for ours, loop in (
                (found_flow.skip_share, shares),
                (found_flow.branch_to_skip, ratios),
                (found_flow.cosine, cosines),
                (found_flow.relative_norm, norms),
                (found_flow.norm_gain, gains),
            ):
                assert ours[step, 0] == pytest.approx(np.mean(loop), rel=1e-10)
                assert min(loop) - 1e-12 <= ours[step, 1] <= ours[step, 0] <= ours[step, 2] <= max(loop) + 1e-12


def test_two_halves_merged_are_the_whole() -> None:
    found = case("llama", DOUBLE)
    source = source_of(found.module, inputs=found.inputs, batch_tokens=11)
    blocks = list(source.blocks())
    assert len(blocks) == 3
    parts = [GradientFlow(source, 1) for _ in range(2)]
    parts[0].update(blocks[0])
    parts[1].update(blocks[1])
    parts[1].update(blocks[2])
    parts[1].merge(parts[0])  # in whatever order
    whole = gradient_flow(found.module, inputs=found.inputs, at_once=3, progress=False)
    merged = parts[1].result()
    np.testing.assert_allclose(merged.flow.skip_share, whole.flow.skip_share, rtol=1e-10)
    np.testing.assert_allclose(merged.flow_all.gradient_norm, whole.flow_all.gradient_norm, rtol=1e-10)


def test_how_the_text_is_cut_into_blocks_changes_nothing_and_windows_of_one_document_stay_together() -> None:
    found = case("nanogpt", DOUBLE)
    ids = torch.randint(0, 90, (64,), generator=torch.Generator().manual_seed(0))
    flows = []
    for batch in (8, 64):
        flows.append(
            gradient_flow(found.module, tokens=[ids[:48], ids[48:]], window=8, batch_tokens=batch, progress=False)
        )
    assert (flows[0].sequences, flows[0].documents) == (8, 2)
    np.testing.assert_allclose(flows[0].loss, flows[1].loss, rtol=1e-12)
    np.testing.assert_allclose(flows[0].flow.skip_share, flows[1].flow.skip_share, rtol=1e-9)
    alone = gradient_flow(found.module, tokens=[ids[:48]], window=8, progress=False)
    assert (alone.sequences, alone.documents) == (6, 1)
    assert alone.loss[1] < alone.loss[0] < alone.loss[2]


def test_intervals_are_over_windows_where_documents_are_few_and_the_title_says_so() -> None:
    found = case("nanogpt", DOUBLE)
    generator = torch.Generator().manual_seed(0)
    few, many = (torch.randint(0, 90, (docs, 8), generator=generator) for docs in (6, 12))
    one_text = gradient_flow(found.module, tokens=[few.flatten()], window=8, progress=False)
    assert (one_text.sequences, one_text.documents, one_text.unit) == (6, 1, "window")
    assert one_text.title.endswith("95 % intervals over 6 windows")
    several = gradient_flow(found.module, tokens=list(many), progress=False)
    assert (several.sequences, several.documents, several.unit) == (12, 12, "document")
    assert several.title.endswith("95 % intervals over 12 documents")
    for flow in (one_text.flow, several.flow):
        for values in (flow.skip_share, flow.branch_share, flow.cosine, flow.relative_norm[:-1]):
            assert (values[:, 1] < values[:, 0]).all()
            assert (values[:, 0] < values[:, 2]).all()
    lone = gradient_flow(found.module, tokens=[few[0]], progress=False)
    assert np.isfinite(lone.loss[0])
    assert np.isnan(lone.loss[1:]).all()  # one window says nothing about others
    assert lone.plot_shares().containers


def test_panels_stand_above_each_other_and_every_bar_has_its_interval() -> None:
    """Bar s stands between the states s and s + 1 of the panel above, however many branches it has."""
    for name, panels in (("gptj", 2), ("bert", 3)):
        found = gradient_flow(case(name).module, inputs=case(name).inputs, progress=False)
        figure = found.plot().figure
        places = figure.axes
        assert len(places) == panels
        assert {place.get_xlim() for place in places} == {(-0.5, len(found.flow.relative_norm) - 0.5)}
        bars: Any = places[1].patches
        middles = [bar.get_x() + bar.get_width() / 2 for bar in bars]
        count = len(found.flow.skip_share)
        assert middles == pytest.approx([s + 0.5 for s in [*range(count), *found.steps]])
        heights = [*found.flow.skip_share[:, 0], *found.flow.branch_share[:, 0]]
        assert [bar.get_height() for bar in bars] == pytest.approx(heights)
        whiskers: Any = places[1].collections
        drawn = [line.get_segments()[0] for line in whiskers]
        lengths = [*found.flow.skip_share, *found.flow.branch_share]
        assert [s[1, 1] - s[0, 1] for s in drawn] == pytest.approx([high - low for _, low, high in lengths])


def test_every_mean_of_a_row_has_its_interval_beside_it() -> None:
    found = gradient_flow(case("gptj").module, inputs=case("gptj").inputs, progress=False)
    for index, row in enumerate(found.rows()):
        assert (row["low"], row["high"]) == tuple(found.flow.branch_share[index, 1:])
        for name in ("branch_to_skip", "cosine"):
            own = getattr(found.flow, name)[index]
            assert (row[name], row[f"{name}_low"], row[f"{name}_high"]) == tuple(own)
        for name in ("skip_share", "gradient_norm", "relative_norm", "norm_gain", "identity_gain"):
            own = getattr(found.flow, name)[row["step"]]
            assert (row[name], row[f"{name}_low"], row[f"{name}_high"]) == tuple(own)


@pytest.mark.parametrize("batch", [8, 24])
def test_sequences_are_spread_over_text_of_any_lengths(batch: int) -> None:
    """Short documents come first here: counted by tokens, hardly one of them would be run."""
    found = case("nanogpt")
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, 90, (length,), generator=generator) for length in [2] * 16 + [8] * 16 + [1] * 4]
    source = source_of(found.module, tokens=ids, window=None, batch_tokens=batch)
    flow = GradientFlow(sequences_of(source, 8), 4)
    for block in flow.source.blocks():
        flow.update(block)
    assert flow.doc == [3, 7, 11, 15, 19, 23, 27, 31]
    everything = gradient_flow(source, sequences=None, progress=False)
    assert everything.sequences == 32  # nothing flows into a document of one token


@pytest.mark.parametrize("name", ["gpt2", "bert", "gptj"])
def test_a_file_gives_what_the_live_model_gives(name: str, tmp_path: Path) -> None:
    found = case(name)
    with taken(found, tmp_path / "x.h5") as capture:
        stored = gradient_flow(capture, model=sl.load(found.module), progress=False)
    live = gradient_flow(found.module, inputs=found.inputs, progress=False)
    assert [row["label"] for row in stored.rows()] == [row["label"] for row in live.rows()]
    for own, other in zip(stored.rows(), live.rows(), strict=True):
        numbers = {k: v for k, v in own.items() if isinstance(v, float)}
        assert numbers == pytest.approx({k: other[k] for k in numbers}, rel=1e-4, abs=1e-6)


def test_the_limit_on_sequences_holds_and_is_told() -> None:
    found = case("gpt2")
    some = gradient_flow(found.module, inputs=found.inputs, sequences=2, at_once=1, progress=False)
    assert some.sequences == 2
    assert "2 of 3 windows" in some.title
    assert " of 3 windows" not in gradient_flow(found.module, inputs=found.inputs, sequences=3, progress=False).title
    source = source_of(found.module, inputs=found.inputs)
    (block,) = source.blocks()
    assert [g.docs for g in graphs(source, block, 2)] == [2, 1]


def test_one_graph_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = 0

    def watched(*arguments: Any) -> Graph:
        nonlocal most
        most = max(most, len(alive))
        graph = open_graph(*arguments)
        alive.add(graph.losses)
        return graph

    monkeypatch.setattr(gradient_graph, "open_graph", watched)
    found = case("gpt2")
    gradient_flow(found.module, inputs=found.inputs, at_once=1, progress=False)
    assert most == 0
    assert len(alive) == 0


def test_the_objective_follows_the_model() -> None:
    for name, expected in (("gpt2", "cross_entropy"), ("bert", "cross_entropy"), ("vit", "pooled_norm")):
        found = case(name)
        assert gradient_flow(found.module, inputs=found.inputs, progress=False).objective == expected
    ids: Tensor = case("gpt2").inputs["input_ids"]  # type: ignore[index]
    with torch.no_grad():
        logits = invoke(case("gpt2").module, case("gpt2").inputs)
    plain = torch.stack([F.cross_entropy(logits[d, :-1], ids[d, 1:]) for d in range(len(ids))]).mean()
    loss = gradient_flow(case("gpt2").module, inputs=case("gpt2").inputs, progress=False).loss
    assert loss[0] == pytest.approx(float(plain), rel=1e-6)


def test_each_stream_of_an_encoder_decoder_is_split() -> None:
    found = case("transformer_pre")
    for stream in ("encoder", "decoder"):
        flow = gradient_flow(found.module, inputs=found.inputs, stream=stream, progress=False)
        assert flow.closure < 1e-5
        assert set(flow.kinds) == ({"attn", "mlp"} if stream == "encoder" else {"attn", "cross_attn", "mlp"})


def test_no_line_of_a_title_holds_one_last_word() -> None:
    words = "Gradient flow, main: a model, a text of some kind, 768 tokens; 95 % intervals over windows"
    for inches in (2.0, 3.0, 4.0, 5.0):
        lines = wrapped(words, inches).splitlines()
        assert " ".join(lines) == words
        assert max(map(len, lines)) - len(lines[-1]) <= 15, lines


def test_on_an_axis_that_is_spread_out_the_largest_value_stands_below_the_frame() -> None:
    ax = axes(None)
    values = [0.38, 0.007, 0.005, 0.016]
    ax.plot(values, "o")
    spread_out(ax, values)
    assert ax.get_yscale() == "symlog"
    assert ax.get_ylim()[1] > 1.2 * max(values)
    ticks = [tick for tick in ax.get_yticks() if 0 < tick < ax.get_ylim()[1]]
    assert len(ticks) >= 4


# ---- what cannot be done --------------------------------------------------------------------------------------------


class Closed(Elementwise):
    """Records no gradients."""

    def forward(self, x: Tensor) -> Tensor:
        """(doc, position, d_model) to the same."""
        with torch.no_grad():
            return super().forward(x)


class Hidden(Elementwise):
    """Adds in place, and does not take what the addition returns."""

    def forward(self, x: Tensor) -> Tensor:
        """(doc, position, d_model) to the same."""
        x = 2 * x
        for layer in self.layers:
            x.add_(torch.tanh(layer(x)))
        return x + 0


@pytest.mark.parametrize(("kind", "message"), [(Closed, "does not record"), (Hidden, "overwritten in place")])
def test_a_forward_that_cannot_be_followed_is_refused(kind: type[nn.Module], message: str) -> None:
    x = torch.randn(2, 3, 4, dtype=DOUBLE)
    with pytest.raises(AnatomyError, match=message):
        gradient_flow(kind(), inputs=x, progress=False)


def test_a_capture_whose_model_or_inputs_are_not_there(tmp_path: Path) -> None:
    with taken(case("gpt2"), tmp_path / "ids.h5") as capture, pytest.raises(MissingDataError, match="model="):
        gradient_flow(capture, progress=False)
    found = case("user_post_norm_embeddings")
    with taken(found, tmp_path / "x.h5") as capture, pytest.raises(MissingDataError, match="not token ids"):
        gradient_flow(capture, model=sl.load(found.module), progress=False)


def test_sequences_without_a_target_are_told() -> None:
    found = case("gpt2")
    source = source_of(found.module, inputs=found.inputs)
    with pytest.raises(MissingDataError, match="no sequence has a gradient"):
        GradientFlow(source, 1).result()
    lone = graph_of(found, targets=torch.full((found.docs, length(found, "main")), -1))
    assert float(lone.losses.detach().sum()) == 0
    assert all(float(g.norm()) == 0 for g in lone.gradients())


@pytest.mark.parametrize("options", [{"sequences": 0}, {"at_once": 0}])
def test_at_least_one_sequence(options: dict[str, Any]) -> None:
    found = case("gpt2")
    with pytest.raises(UsageError, match="at least one"):
        gradient_flow(found.module, inputs=found.inputs, progress=False, **options)


# ---- as typed -------------------------------------------------------------------------------------------------------

MODEL = str(Path(__file__).resolve().parent.parent / "fixtures" / "model.pt")
SMALL = ["--window", "32", "--max-tokens", "128"]


def test_the_command_after_a_capture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = CliRunner()
    assert run.invoke(main, ["capture", MODEL, *SMALL]).exit_code == 0
    done = run.invoke(main, ["gradient", "--json", "--plot", "g.png", "--csv", "g.csv"])
    assert done.exit_code == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    labels = [row["label"] for row in rows]
    assert labels[:2] == ["0_attn_out", "0_mlp_out"]
    assert all(row["skip_share"] + row["branch_share"] == pytest.approx(1, abs=1e-4) for row in rows)
    assert (tmp_path / "g.png").stat().st_size > 10_000
    assert len((tmp_path / "g.csv").read_text().splitlines()) == len(rows) + 1
    table = run.invoke(main, ["gradient", MODEL, *SMALL, "--sequences", "2"])
    assert max(map(len, table.stdout.splitlines())) <= 80
    assert "2 sequences of 1 document;" in " ".join(table.stderr.split())


@pytest.mark.parametrize("arguments", [["--max-length", "3"], ["--all", "--sequences", "2"]])
def test_options_that_contradict_each_other(arguments: list[str]) -> None:
    done = CliRunner().invoke(main, ["gradient", MODEL, *SMALL, *arguments])
    assert done.exit_code == 2
    assert "Traceback" not in done.stderr
