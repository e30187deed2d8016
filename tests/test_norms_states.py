"""The size of the states, what skips keep of them, terms in the final frame, and cosines: loops, matrices, planted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

import streamlens as sl
from streamlens.analyses.frozen import stream_norms
from streamlens.analyses.norms.answer import NormsResult
from streamlens.analyses.norms.cosines import WriteCosinesResult
from streamlens.analyses.source import Source
from streamlens.block import Block
from streamlens.cli.app import main
from streamlens.errors import UsageError
from tests.conftest import case
from tests.test_norms import columns, norms_of, source_for

NAMED = ["gpt2", "bert", "user_post_norm", "scaled_skip_constant", "deepnorm", "gptj", "t5"]


def opened(name: str) -> tuple[Source, Block, NormsResult]:
    source = source_for(case(name))
    return source, next(iter(source.blocks())), norms_of(source)


@pytest.mark.parametrize("name", NAMED)
def test_sizes_by_a_plain_loop(name: str) -> None:
    _, block, result = opened(name)
    for k, state in enumerate(block.states):
        size = [float(x.double().norm()) for x in state]
        later = [s for s, p in zip(size, block.position.tolist(), strict=True) if p > 0]
        first = [s for s, p in zip(size, block.position.tolist(), strict=True) if p == 0]
        assert result.states.mean[k] == pytest.approx(np.mean(later), rel=1e-6)
        assert result.states.mean_with_first[k] == pytest.approx(np.mean(size), rel=1e-6)
        assert result.states.mean_at_first[k] == pytest.approx(np.mean(first), rel=1e-6)
        for share, found in ((25, result.states.lower_quartile), (75, result.states.upper_quartile)):
            low, high = (np.percentile(later, share, method=m) for m in ("lower", "higher"))
            assert 0.99 * low <= found[k] <= 1.01 * high


def matrices(source: Source, block: Block, token: int) -> list[Tensor]:
    """(d_model, d_model) float64 of each step's skip for one token, its norm written out."""
    stream, norms = source.stream, stream_norms(source.stream, source.parameters)
    place = {n.state: i for i, n in enumerate(stream.norms)}
    one, found = torch.eye(stream.d_model, dtype=torch.float64), []
    for index, step in enumerate(stream.steps):
        matrix = one * (step.scale if isinstance(step.scale, float) else 1.0)
        if index + 1 in norms:
            norm, rstd = norms[index + 1], block.norms[place[index + 1]][1][token].double()
            centring = one - 1 / stream.d_model if norm.centred else one
            matrix = norm.gain.double()[:, None] * centring * rstd @ matrix
        found.append(matrix)
    return found


@pytest.mark.parametrize("name", ["bert", "user_post_norm", "scaled_skip_constant", "deepnorm", "gpt2"])
def test_what_the_skips_keep_by_dense_matrices(name: str) -> None:
    source, block, result = opened(name)
    kept: dict[int, list[float]] = {}
    energy = np.zeros(len(source.stream.steps) + 1)
    for token in (t for t in range(block.stop) if int(block.position[t]) > 0):
        carried = block.states[0][token].double()
        energy[0] += float(carried @ carried)
        for index, matrix in enumerate(matrices(source, block, token)):
            x = block.states[index][token].double()
            kept.setdefault(index + 1, []).append(float((matrix @ x).norm() / x.norm()))
            carried = matrix @ carried
            energy[index + 1] += float(carried @ carried)
    assert np.isnan(result.states.forgetting_factor[0])
    for k, ratios in kept.items():
        assert result.states.forgetting_factor[k] == pytest.approx(np.mean(ratios), rel=1e-5)
    np.testing.assert_allclose(result.states.identity_gain, np.sqrt(energy / energy[0]), rtol=1e-5)
    assert result.identity_gain == result.states.identity_gain[-1]
    if name == "gpt2":
        assert (result.states.identity_gain == 1).all()
        assert (result.states.forgetting_factor[1:] == 1).all()


@pytest.mark.parametrize("name", ["bert", "user_post_norm", "scaled_skip_constant", "deepnorm"])
def test_the_final_frame_by_dense_matrices(name: str) -> None:
    """|T w| with T the product of the matrices from the write to the end; a layer is the sum of its writes there."""
    source, block, result = opened(name)
    stream = source.stream
    sizes: dict[str, list[float]] = {}
    for token in (t for t in range(block.stop) if int(block.position[t]) > 0):
        maps, layers = matrices(source, block, token), [torch.zeros(stream.d_model).double()] * stream.layers
        for sublayer in stream.sublayers:
            through = torch.eye(stream.d_model, dtype=torch.float64)
            for later in maps[sublayer.read + 1 :]:
                through = later @ through
            scale = stream.steps[sublayer.read].scale
            own = maps[sublayer.read] / (scale if isinstance(scale, float) else 1.0)
            carried = through @ own @ block.writes[sublayer.index][token].double()
            sizes.setdefault(sublayer.label, []).append(float(carried.norm()))
            layers[sublayer.layer] = layers[sublayer.layer] + carried
        for number, vector in enumerate(layers):
            sizes.setdefault(f"layer.{number}", []).append(float(vector.norm()))
    for label, values in sizes.items():
        assert columns(result, label)["final_frame_norm"] == pytest.approx(np.mean(values), rel=1e-5), label


def test_without_norms_the_final_frame_is_the_write_itself() -> None:
    _, block, result = opened("gpt2")
    for label in ("0_attn_out", "2_mlp_out", "layer.1"):
        assert columns(result, label)["final_frame_norm"] == columns(result, label)["write_norm"]
    size = block.parts[0].double().norm(dim=-1)[block.position > 0].mean()
    assert columns(result, "embed")["final_frame_norm"] == pytest.approx(float(size))


def test_the_final_frame_does_not_depend_on_how_many_tokens_are_carried(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = opened("bert")[2].column("final_frame_norm")
    monkeypatch.setattr("streamlens.analyses.norms.accumulate._FRAME_BYTES", 1)
    np.testing.assert_allclose(opened("bert")[2].column("final_frame_norm"), whole, rtol=1e-6)


class _Spiked(nn.Module):
    """An embedding with planted entries: 5000 in dimension 3 of token 7, and 40 in dimension 11 of all tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.mlp, self.head = nn.Embedding(12, 32), nn.Linear(32, 32), nn.Linear(32, 12)
        self.embed.weight.data.clamp_(-2, 2)
        self.embed.weight.data[:, 11] = 40.0
        self.embed.weight.data[7, 3] = 5000.0
        self.embed.weight.data[5, 2] = 150.0  # large, but not a thousand times the median
        self.mlp.weight.data.zero_()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        out: Tensor = self.head(x + self.mlp(x))
        return out


def test_massive_activations_and_outlier_dimensions_are_told_apart() -> None:
    ids = torch.tensor([[7, 1, 2, 3, 7, 5], [0, 1, 7, 4, 2, 5]])
    found = sl.contribution_norms(_Spiked(), inputs=ids, progress=False).states
    massive = [(m.state, m.dimension, m.tokens, m.first_tokens, m.largest) for m in found.massive]
    assert massive == [(0, 3, 3, 1, 5000.0), (1, 3, 3, 1, pytest.approx(5000.0, abs=1))]
    assert found.outlier_dimensions[0] == (2, 11), "dimension 3 is massive at some tokens and no outlier elsewhere"
    row = found.rows()[0]
    assert (row["massive_dimensions"], row["massive_tokens"], row["massive_tokens_at_first"]) == ([3], 3, 1)
    assert found.short_rows()[0]["outliers"] == "2 11"


def test_growth_is_that_of_a_geometric_stream() -> None:
    class Doubling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.head = nn.Embedding(9, 8), nn.Linear(8, 9)
            self.mlps = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(4))
            for weight in self.mlps.parameters():
                weight.data.copy_(torch.eye(8))

        def forward(self, ids: Tensor) -> Tensor:
            x = self.embed(ids)
            for mlp in self.mlps:
                x = x + mlp(x)
            out: Tensor = self.head(x)
            return out

    found = sl.contribution_norms(Doubling(), inputs=torch.arange(18).reshape(2, 9) % 9, progress=False).states
    assert found.growth == pytest.approx(2.0)
    assert found.growth_fit == pytest.approx(1.0)
    assert found.layer_states.tolist() == [0, 1, 2, 3, 4]


def test_cosines_name_the_writes_that_cancel() -> None:
    matrix = np.array([[1.0, -0.5, 0.2], [-0.5, 1.0, 0.7], [0.2, 0.7, 1.0]])
    found = WriteCosinesResult("t", ("a", "b", "c"), matrix, 5)
    assert [(r["label"], r["other"], r["cosine"]) for r in found.rows()] == [
        ("a", "b", -0.5), ("a", "c", 0.2), ("b", "c", 0.7),
    ]  # fmt: skip
    assert found.short_rows()[0] == {"label": "a", "lowest": -0.5, "with": "b", "highest": 0.2, "and with": "c"}


@pytest.mark.parametrize(
    ("name", "logits", "last"),
    [("gpt2", False, "proximity"), ("bert", False, "final_frame_norm"), ("gpt2", True, "logit_attribution")],
)
def test_a_page_has_room_for_the_logits_or_one_frame(name: str, logits: bool, last: str) -> None:
    found = case(name)
    result = sl.contribution_norms(found.module, inputs=found.inputs, logits=logits, progress=False)
    always = ["label", "relative_write", "cosine", "block_influence", "projection_share"]
    rows = {row["label"]: row for row in result.rows()}
    for row in result.short_rows():
        assert list(row) == [*always, last]
        assert row == {column: rows[row["label"]][column] for column in row}
    layers = result.short_rows(layers_only=True)
    assert [row["label"] for row in layers] == [label for label, row in rows.items() if row["kind"] == "layer"]
    assert len(layers) == found.anatomy.stream().layers
    assert list(layers[0]) == [*always[:-1], *([last] if last != "proximity" else [])]


def test_the_result_shows_itself() -> None:
    result = opened("gpt2")[2]
    page = result._repr_html_()
    assert "<svg" in page
    assert "relative_write" in page
    assert len(result.to_frame()) == len(result.contributions)
    short = result.short_rows()
    assert [row["label"] for row in short] == [c.label for c in result.contributions]
    assert {"relative_write", "projection_share"} < set(short[0]) < set(result.rows()[0])
    assert not {"logit_attribution", "final_frame_norm"} & set(
        short[0]
    )  # nobody asked; nothing else in a pre-norm model
    assert "final_frame_norm" in opened("bert")[2].short_rows()[0]
    assert "relative_write_lower_quartile" in result.to_frame().columns
    drawn = {
        result.plot: ("Layer", "Relative write |w| / |x|\n(median, quartiles)"),
        result.plot_shares: ("Part of the last state", "Projection share (sums to 1)"),
        result.states.plot: ("State (sublayers done)", "Size of the state |x|"),
        result.cosines.plot: ("Write", "Write"),
    }
    for draw, labels in drawn.items():
        ax = draw()
        assert (ax.get_xlabel(), ax.get_ylabel()) == labels
        assert ax.get_title(loc="left").split(":")[0] in (
            "Contribution norms", "Shares of the last state", "Size of the states", "Cosines of writes",
        )  # fmt: skip
    legend = result.plot().get_legend()
    assert legend is not None
    assert [t.get_text() for t in legend.get_texts()] == ["attention", "MLP"]


def test_attributed_logits_have_a_panel() -> None:
    found = case("gpt2")
    result = sl.contribution_norms(found.module, inputs=found.inputs, logits=True, progress=False)
    figure = result.plot().get_figure()
    assert figure is not None
    upper, lower = figure.axes
    assert lower.get_ylabel() == "Added to the target's logit\n(logits; median, quartiles)"
    assert upper.get_ylabel() == "Relative write |w| / |x|\n(median, quartiles)"
    drawn = {
        float(y) for line in lower.get_lines() for y in np.asarray(line.get_ydata()) if np.size(line.get_xdata()) > 2
    }
    known = {r["logit_attribution_median"] for r in result.rows() if r["kind"] in ("attn", "mlp")}
    assert drawn == known, "every sublayer, and nothing else"
    alone = result.plot_logits()
    assert alone.get_title(loc="left").startswith("Direct logit attribution:")
    bare = opened("gpt2")[2]
    assert len(bare.plot().get_figure().axes) == 1  # type: ignore[union-attr]
    with pytest.raises(UsageError, match="logits=True"):
        bare.plot_logits()


class TestCommand:
    @pytest.fixture(autouse=True)
    def _here(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        found = case("user_post_norm")
        sl.capture(found.module, inputs=found.inputs, out="x.h5", progress=False).close()

    def run(self, *arguments: str, code: int = 0) -> Any:
        done = CliRunner().invoke(main, ["norms", "x.h5", *arguments])
        assert done.exit_code == code, done.output
        return done

    def test_states(self) -> None:
        shown = self.run("--states", "--plot", "depth.png")
        assert "the mean size grows by a factor of" in shown.stderr
        assert max(map(len, shown.stdout.splitlines())) <= 80
        assert Path("depth.png").exists()
        rows = json.loads(self.run("--states", "--json").stdout)["rows"]
        assert rows[0]["forgetting_factor"] is None
        assert {"norm", "norm_lower_quartile", "identity_gain", "outlier_dimensions"} <= set(rows[1])

    def test_cosines(self) -> None:
        shown = self.run("--cosines", "--plot", "cosines.png")
        assert max(map(len, shown.stdout.splitlines())) <= 80
        rows = json.loads(self.run("--cosines", "--json").stdout)["rows"]
        sublayers = len(case("user_post_norm").anatomy.stream().sublayers)
        assert len(rows) == sublayers * (sublayers - 1) // 2
        assert all(-1 <= row["cosine"] <= 1 for row in rows)

    def test_the_final_frame_is_shown_where_there_is_one(self) -> None:
        assert "final_norm" in self.run().stdout

    @pytest.mark.parametrize(
        "arguments", [["--states", "--cosines"], ["--states", "--heads"], ["--cosines", "--logits"]]
    )
    def test_what_does_not_go_together(self, arguments: tuple[str, ...]) -> None:
        self.run(*arguments, code=2)
