"""Contribution norms against plain loops over tokens, exact identities, and a forward pass written by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

import streamlens as sl
from streamlens.analyses.frozen import stream_norms
from streamlens.analyses.heads import projections
from streamlens.analyses.norms.accumulate import ContributionNorms
from streamlens.analyses.norms.answer import NormsResult
from streamlens.analyses.norms.measures import MEASURES, OVERLAPPING, pair
from streamlens.analyses.source import Source, source_of
from streamlens.analyses.transport import pulled_back
from streamlens.analyses.unembedding import Unembedding
from streamlens.block import Block
from streamlens.calling import invoke
from streamlens.checkpoint.model import wrap
from streamlens.cli.app import main
from streamlens.errors import MissingDataError
from tests.conftest import Case, case

PRE = ["gpt2", "llama", "gemma2", "gptj", "granite", "nanogpt", "mamba", "scaled_skip_parameter", "parallel_chain"]
POST = ["bert", "user_post_norm", "encoder_post", "deepnorm"]


def source_for(found: Case, *, heads: bool = False, stream: str | None = None) -> Source:
    return source_of(wrap(found.module, found.name, {}), inputs=found.inputs, heads=heads, stream=stream)


def norms_of(source: Source, **options: Any) -> NormsResult:
    return sl.contribution_norms(source, progress=False, **options)


def columns(result: NormsResult, label: str) -> dict[str, float]:
    (row,) = [i for i, c in enumerate(result.contributions) if c.label == label]
    return dict(zip(MEASURES, result.mean[row].tolist(), strict=True))


def slow(block: Block, source: Source) -> dict[str, dict[str, float]]:
    """Means without position 0 of what can be said of one token in a line of arithmetic, sublayer by sublayer."""
    answers: dict[str, dict[str, float]] = {}
    for sublayer in source.stream.sublayers:
        sums: dict[str, list[float]] = {}
        for token in range(block.stop - block.start):
            if int(block.position[token]) == 0:
                continue
            x = [float(v) for v in block.states[sublayer.read][token]]
            w = [float(v) for v in block.writes[sublayer.index][token]]
            xx, ww = sum(a * a for a in x), sum(b * b for b in w)
            xw = sum(a * b for a, b in zip(x, w, strict=True))
            y = [a + b for a, b in zip(x, w, strict=True)]
            yy, xy = sum(a * a for a in y), sum(a * b for a, b in zip(x, y, strict=True))
            values = {
                "relative_write": math.sqrt(ww) / math.sqrt(xx),
                "cosine": xw / math.sqrt(xx * ww),
                "growth": yy / xx,
                "block_influence": 1 - xy / math.sqrt(xx * yy),
                "write_norm": math.sqrt(ww),
                "read_norm": math.sqrt(xx),
            }
            for key, value in values.items():
                sums.setdefault(key, []).append(value)
        answers[sublayer.label] = {key: sum(v) / len(v) for key, v in sums.items()}
    return answers


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "gptj", "granite", "bert", "t5", "bart"])
def test_sizes_and_directions_against_a_plain_loop(name: str) -> None:
    source = source_for(case(name))
    (block,) = source.blocks()
    result = norms_of(source)
    for label, truth in slow(block, source).items():
        found = columns(result, label)
        for measure, value in truth.items():
            assert found[measure] == pytest.approx(value, rel=2e-5, abs=2e-6), (label, measure)


@pytest.mark.parametrize("name", PRE + POST)
def test_shares_of_the_last_state_sum_to_one(name: str) -> None:
    """A forgotten embedding part, bias, factor on the skip, or a sigma without epsilon leaves a gap."""
    found = case(name)
    for stream in found.anatomy.streams:
        result = norms_of(source_for(found, stream=stream.name))
        shares = result.column("projection_share")
        total = sum(s for s, c in zip(shares, result.contributions, strict=True) if c.kind not in OVERLAPPING)
        assert total == pytest.approx(1.0, abs=3e-6)
        labels = [c.label for c in result.contributions if c.kind not in OVERLAPPING]
        biases = [f"bias:{n.label}" for n in stream.norms if n.state is not None]
        assert labels == [p.label for p in stream.parts] + list(stream.labels) + biases


@pytest.mark.parametrize("name", ["bert", "user_post_norm"])
def test_shares_of_a_post_norm_model_against_dense_matrices(name: str) -> None:
    """Each norm written out as a d_model x d_model matrix for every token, as nobody would in earnest."""
    source = source_for(case(name))
    stream, norms = source.stream, stream_norms(source.stream, source.parameters)
    (block,) = source.blocks()
    place = {n.state: i for i, n in enumerate(stream.norms)}
    truth: dict[str, list[float]] = {}
    for token in (t for t in range(block.stop) if int(block.position[t]) > 0):
        through = torch.eye(stream.d_model, dtype=torch.float64)
        last = block.states[-1][token].double()
        for sublayer in reversed(stream.sublayers):
            norm, rstd = norms[sublayer.read + 1], block.norms[place[sublayer.read + 1]][1][token].double()
            d = stream.d_model
            centring = torch.eye(d, dtype=torch.float64) - 1 / d
            through = through @ (norm.gain.double()[:, None] * centring * rstd)
            share = last @ through @ block.writes[sublayer.index][token].double() / (last @ last)
            truth.setdefault(sublayer.label, []).append(float(share))
    result = norms_of(source)
    for label, shares in truth.items():
        assert columns(result, label)["projection_share"] == pytest.approx(np.mean(shares), abs=1e-6)


NEAR = ["gpt2", "gptj", "user_post_norm", "scaled_skip_constant", "gemma2", "granite", "bert", "t5", "bart"]


@pytest.mark.parametrize("name", NEAR)
def test_proximity_against_a_plain_loop(name: str) -> None:
    source = source_for(case(name))
    (block,) = source.blocks()
    result, stream = norms_of(source), source.stream
    for index, step in enumerate(stream.steps):
        scale = step.scale if isinstance(step.scale, float) else 1.0
        wanted: dict[int, list[float]] = {s: [] for s in step.sublayers}
        for token in (t for t in range(block.stop) if int(block.position[t]) > 0):
            terms = [scale * block.states[index][token].double()]
            terms += [block.writes[s][token].double() for s in step.sublayers]
            y = sum(terms, torch.zeros_like(terms[0]))
            near = [max(float(y.abs().sum() - (y - term).abs().sum()), 0.0) for term in terms]
            for s, value in zip(step.sublayers, near[1:], strict=True):
                wanted[s].append(value / sum(near) if sum(near) else 1 / len(near))
        for s, values in wanted.items():
            label = stream.sublayers[s].label
            assert columns(result, label)["proximity"] == pytest.approx(np.mean(values), abs=2e-6)


@pytest.mark.parametrize("name", ["gpt2", "llama", "granite", "cohere", "gptj", "opt", "t5", "bart", "mamba"])
def test_direct_attribution_adds_up_to_the_logits(name: str) -> None:
    found = case(name)
    source = source_for(found)
    (block,) = source.blocks()
    unembedding = Unembedding(source)
    targets = torch.arange(block.stop) % 7
    folded = ContributionNorms(source, unembedding=unembedding)
    table = _attributions(folded, block, unembedding, targets)
    with torch.no_grad():
        logits = invoke(found.module, source.inputs(block)).flatten(0, 1)
    whole = logits.gather(-1, targets[:, None])[:, 0] - logits.mean(-1)
    total = table + unembedding.constant(block, targets)
    assert torch.allclose(total, whole, atol=1e-4 * float(whole.abs().max()))


def test_a_cap_on_the_logits_is_left_out_of_the_attribution() -> None:
    found = case("gemma2")
    source = source_for(found)
    (block,) = source.blocks()
    unembedding, cap = Unembedding(source), float(found.module.config.final_logit_softcapping)  # type: ignore[union-attr, arg-type]
    targets = torch.arange(block.stop) % 7
    total = _attributions(ContributionNorms(source), block, unembedding, targets, centred=False)
    total = total + unembedding.constant(block, targets, centred=False)
    with torch.no_grad():
        logits = invoke(found.module, source.inputs(block)).flatten(0, 1).gather(-1, targets[:, None])[:, 0]
    assert torch.allclose(cap * torch.tanh(total / cap), logits, atol=1e-4)


def _attributions(
    folded: ContributionNorms, block: Block, unembedding: Unembedding, targets: Tensor, *, centred: bool = True
) -> Tensor:
    table = torch.zeros(len(folded.contributions), len(MEASURES), block.stop, dtype=torch.float64)
    folded._walk_back(block, unembedding.directions(block, targets, centred=centred), "logit_attribution", table)
    return table[:, MEASURES.index("logit_attribution")].sum(0).float()


def test_attribution_to_the_vocabulary_is_refused_where_it_means_nothing() -> None:
    with pytest.raises(MissingDataError, match="not linear behind its norm"):
        norms_of(source_for(case("bert")), logits=True)
    with pytest.raises(MissingDataError, match="does not end in logits"):
        norms_of(source_for(case("bert_model")), logits=True)


@pytest.mark.parametrize("name", ["gpt2", "gptj", "user_post_norm", "bart"])
def test_heads_and_the_bias_of_their_projection_share_what_their_attention_has(name: str) -> None:
    source = source_for(case(name), heads=True)
    (block,) = source.blocks()
    result, learned = norms_of(source, heads=True), projections(source)
    shares = dict(zip((c.label for c in result.contributions), result.column("projection_share"), strict=True))
    along = block.states[-1].double()
    if any(n.state is None and n.form == "layer_norm" for n in source.stream.norms):
        along = along - along.mean(-1, keepdim=True)
    along = along / (along * along).sum(-1, keepdim=True)
    for summand, direction in pulled_back(source.stream, stream_norms(source.stream, source.parameters), block, along):
        if summand.kind in ("attn", "cross_attn"):
            bias = float((direction @ learned[summand.index].bias.double())[block.position > 0].mean())
            heads = sum(shares[f"{summand.label}.{head}"] for head in range(len(learned[summand.index].weight)))
            assert heads + bias == pytest.approx(shares[summand.label], abs=1e-6)


def test_a_capture_without_value_mixes_says_how_to_get_them(tmp_path: Path) -> None:
    found = case("gpt2")
    model = wrap(found.module, "gpt2", {})
    capture = sl.capture(model, tokens=torch.arange(40).reshape(4, 10), out=tmp_path / "a.h5", progress=False)
    with capture, pytest.raises(MissingDataError, match="capture again with --heads"):
        sl.contribution_norms(capture, model=model, heads=True, progress=False)


def test_a_layer_is_all_its_writes_together() -> None:
    source = source_for(case("gpt2"))
    (block,) = source.blocks()
    result, kept = norms_of(source), block.position > 0
    for layer in range(source.stream.layers):
        x, y = block.states[2 * layer].double()[kept], block.states[2 * layer + 2].double()[kept]
        found = columns(result, f"layer.{layer}")
        assert found["relative_write"] == pytest.approx(float(((y - x).norm(dim=-1) / x.norm(dim=-1)).mean()), rel=1e-5)
        cosine = torch.nn.functional.cosine_similarity(x, y, dim=-1)
        assert found["block_influence"] == pytest.approx(float((1 - cosine).mean()), rel=1e-4, abs=1e-6)


def test_cosines_between_writes_against_a_plain_loop() -> None:
    source = source_for(case("gptj"))
    (block,) = source.blocks()
    result = norms_of(source)
    for i, first in enumerate(block.writes):
        for j, second in enumerate(block.writes):
            truth = torch.nn.functional.cosine_similarity(first.double(), second.double(), dim=-1)
            truth = truth[block.position > 0].mean()
            assert result.cosines.matrix[i, j] == pytest.approx(float(truth), abs=1e-5)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_file_gives_what_the_live_model_gives(name: str, tmp_path: Path) -> None:
    found = case(name)
    live = norms_of(source_for(found, heads=True), heads=True)
    options: dict[str, Any] = {"inputs": found.inputs, "heads": True, "progress": False, "batch_tokens": 11}
    with sl.capture(found.module, out=tmp_path / "a.h5", **options) as capture:
        model = wrap(found.module, "x", {})
        object.__setattr__(model, "sha256", capture.attrs["model_sha256"])
        stored = sl.contribution_norms(capture, model=model, heads=False, progress=False)
        assert stored.contributions == norms_of(source_for(found)).contributions
    kept = [i for i, c in enumerate(live.contributions) if c.kind != "head"]
    np.testing.assert_allclose(stored.mean, live.mean[kept], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(stored.median, live.median[kept], rtol=1e-2, atol=1e-4)


def test_two_halves_merged_are_the_whole(tmp_path: Path) -> None:
    found = case("gpt2")
    with sl.capture(
        found.module, inputs=found.inputs, out=tmp_path / "a.h5", progress=False, batch_tokens=11
    ) as capture:
        source = source_of(capture)
        whole, first, second = (ContributionNorms(source) for _ in range(3))
        for number, block in enumerate(source.blocks()):
            whole.update(block)
            (first if number % 2 else second).update(block)
        first.merge(second)
        merged, together = first.result(), whole.result()
        np.testing.assert_allclose(merged.mean, together.mean, rtol=1e-12)
        np.testing.assert_array_equal(merged.median, together.median)
        pd.testing.assert_frame_equal(merged.states.to_frame(), together.states.to_frame())
        np.testing.assert_allclose(merged.cosines.matrix, together.cosines.matrix, rtol=1e-12)


def test_the_scale_law() -> None:
    """Three times the write is three times the relative write, in the same direction."""

    class Scaled(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.linear, self.head = nn.Embedding(9, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 9)
            self.factor = factor

        def forward(self, ids: Tensor) -> Tensor:
            x = self.embed(ids)
            return self.head(x + self.factor * self.linear(x))  # type: ignore[no-any-return]

    ids = torch.arange(24).reshape(3, 8) % 9
    one, three = (norms_of(source_of(Scaled(k), inputs=ids)) for k in (1.0, 3.0))
    assert columns(three, "0_mlp_out")["relative_write"] == pytest.approx(
        3 * columns(one, "0_mlp_out")["relative_write"]
    )
    assert columns(three, "0_mlp_out")["cosine"] == pytest.approx(columns(one, "0_mlp_out")["cosine"])


def test_position_0_is_left_out_and_kept_apart() -> None:
    source = source_for(case("gpt2"))
    (block,) = source.blocks()
    result, place = norms_of(source), MEASURES.index("write_norm")
    row = [c.label for c in result.contributions].index("0_mlp_out")
    norms = block.writes[1].double().norm(dim=-1)
    assert result.mean_with_first[row, place] == pytest.approx(float(norms.mean()))
    assert result.mean[row, place] == pytest.approx(float(norms[block.position > 0].mean()))
    assert result.mean[row, place] != result.mean_with_first[row, place]


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = case("nanogpt")
    monkeypatch.chdir(tmp_path)
    ids = torch.arange(96).reshape(4, 24) % 30
    sl.capture(found.module, inputs=ids, out="x.h5", progress=False).close()
    run = CliRunner().invoke(main, ["norms", "--json", "--csv", "a.csv", "--plot", "a.svg"])
    assert run.exit_code == 0, run.output
    payload = json.loads(run.stdout)
    assert payload["command"] == "norms"
    assert {row["label"] for row in payload["rows"]} >= {"embed", "0_attn_out", "layer.0"}
    assert "no SOURCE was given: x.h5" in run.stderr
    assert Path("a.csv").read_text().startswith("label,kind,layer,relative_write")
    assert "<svg" in Path("a.svg").read_text()
    run = CliRunner().invoke(main, ["norms", "x.h5", "--plot", "a.gif"])
    assert (run.exit_code, "save to one of .png, .svg" in run.stderr) == (2, True)
    run = CliRunner().invoke(main, ["norms", "x.h5", "--max-tokens", "8"])
    assert (run.exit_code, "--max-tokens can only be given with a model" in " ".join(run.stderr.split())) == (2, True)
    Path("x.h5").unlink()
    run = CliRunner().invoke(main, ["norms"])
    said = " ".join(run.stderr.split())
    assert (run.exit_code, "no capture is here: run `streamlens capture MODEL` first" in said) == (2, True)


def test_beside_a_state_of_zeros_nothing_has_a_size() -> None:
    """The embedding of a padding token is zero, and what is divided by it has to be left out, not to be huge."""
    zero, one = torch.zeros(1), torch.ones(1)
    found = pair(zero, one, zero)
    relative = ("relative_write", "cosine", "growth", "block_influence")
    assert all(bool(found[name].isnan()) for name in relative)
    assert (float(found["write_norm"]), float(found["read_norm"])) == (1.0, 0.0)
    assert not any(bool(found.isnan().any()) for found in pair(one, zero, zero).values())
