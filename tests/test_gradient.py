"""The split of the gradient into skip and branch: exact, equal to a forward written by hand, and to differences."""

from __future__ import annotations

import copy
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn
from torch.nn import functional as F

import streamlens as sl
from streamlens.analyses import gradient_graph
from streamlens.analyses.gradient import GradientFlow, gradient_flow
from streamlens.analyses.gradient_graph import Graph, graphs, open_graph
from streamlens.analyses.source import source_of
from streamlens.calling import invoke
from streamlens.cli.app import main
from streamlens.errors import AnatomyError, MissingDataError, UsageError
from streamlens.observe import observe
from tests.conftest import Case, case, taken

DOUBLE = torch.float64
EVERY_KIND = [
    "gpt2",
    "llama",
    "bert",
    "user_pre_norm",
    "user_post_norm",
    "user_post_norm_embeddings",
    "gemma2",
    "olmo2",
    "granite",
    "parallel_chain",
    "gpt_neox_parallel",
    "inplace_add",
    "inplace_into_branch",
    "scaled_skip_parameter",
    "deepnorm",
    "flat_tokens",
    "vit",
    "mamba",
    "t5",
    "bart",
    "transformer_pre",
    "transformer_post",
]


def length(found: Case, stream: str) -> int:
    """Positions of a stream, in its own run."""
    with torch.no_grad(), observe(found.module, found.anatomy) as seen:
        invoke(found.module, found.inputs)
    state = seen.states[stream][0]
    return state.numel() // state.shape[-1] // found.docs


def graph_of(found: Case, stream: str | None = None, targets: Tensor | None = None) -> Graph:
    """Run a specimen once."""
    own = found.anatomy.stream(stream)
    shape = found.docs, length(found, own.name)
    return open_graph(found.module, found.anatomy, own, found.inputs, shape, targets)


def relative(first: Tensor, second: Tensor) -> float:
    return float((first - second).norm() / second.norm())


# ---- the split ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY_KIND)
def test_skip_and_branches_add_up_to_the_gradient(name: str) -> None:
    found = case(name, DOUBLE)
    for stream in found.anatomy.streams:
        graph = graph_of(found, stream.name)
        gradients = graph.gradients()
        for step in range(len(stream.steps)):
            pulled = graph.across(step, gradients[step + 1][None])
            whole = pulled.skip + sum(graph.through(s, at_write) for s, at_write in pulled.writes.items())
            assert relative(whole[0], gradients[step]) < 1e-12, (stream.name, step)
            assert gradients[step].norm() > 0


def test_without_a_norm_on_the_stream_the_gradient_of_the_sum_is_that_of_the_next_state() -> None:
    graph = graph_of(case("gpt2", DOUBLE))
    gradients = graph.gradients()
    pulled = graph.across(0, gradients[1][None])
    assert torch.equal(pulled.sum[0], gradients[1])
    assert torch.equal(pulled.skip[0], gradients[1])


def test_a_norm_after_the_addition_is_pulled_back_as_its_formula_says() -> None:
    found = case("bert", DOUBLE)
    graph = graph_of(found)
    gradients = graph.gradients()
    for step, norm in enumerate(n for n in graph.stream.norms if n.state):
        y = (graph.states[step] + graph.writes[step]).detach().flatten(0, 1)
        module = dict(found.module.named_modules())[norm.module]
        sigma = (y.var(-1, correction=0, keepdim=True) + norm.epsilon).sqrt()
        hat = (y - y.mean(-1, keepdim=True)) / sigma
        h = gradients[step + 1] * module.weight
        expected = (h - h.mean(-1, keepdim=True) - hat * (h * hat).mean(-1, keepdim=True)) / sigma
        pulled = graph.across(step, gradients[step + 1][None])
        assert relative(pulled.sum[0], expected) < 1e-12
        assert torch.equal(pulled.sum, pulled.skip)


def test_a_scaled_skip_is_scaled() -> None:
    graph = graph_of(case("scaled_skip_constant", DOUBLE))
    gradients = graph.gradients()
    assert relative(graph.across(0, gradients[1][None]).skip[0], 0.9 * gradients[1]) < 1e-15
    assert relative(graph.across(1, gradients[2][None]).skip[0], 1.2 * gradients[2]) < 1e-15


class Elementwise(nn.Module):
    """dL/dx = dL/dy (F' + 1), number by number."""

    def __init__(self, width: int = 4) -> None:
        """Two layers, F(x) = tanh(a x)."""
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, width, bias=False, dtype=DOUBLE) for _ in range(2)])
        for layer, factor in zip(self.layers, (0.7, -1.3), strict=True):
            layer.weight.data = factor * torch.eye(width, dtype=DOUBLE)

    def forward(self, x: Tensor) -> Tensor:
        """(doc, position, d_model) to the same."""
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


@pytest.mark.parametrize("width", [1, 4])
def test_the_textbook_example(width: int) -> None:
    module = Elementwise(width).requires_grad_(False)
    x = torch.randn(2, 3, width, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    anatomy = sl.discover(module, x)
    graph = open_graph(module, anatomy, anatomy.stream(), x, (2, 3), None)
    gradients, states = graph.gradients(), [s.detach().reshape(6, width) for s in graph.states]
    for step, factor in enumerate([0.7, -1.3]):
        slope = factor * (1 - torch.tanh(factor * states[step]) ** 2)
        assert torch.allclose(gradients[step], gradients[step + 1] * (slope + 1), rtol=1e-12, atol=1e-16)
        pulled = graph.across(step, gradients[step + 1][None])
        assert torch.equal(pulled.skip[0], gradients[step + 1])
        branch = graph.through(step, pulled.writes[step])[0]
        assert torch.allclose(branch, gradients[step + 1] * slope, rtol=1e-12, atol=1e-16)


# ---- against a forward written by hand -----------------------------------------------------------------------------


def by_hand(found: Case) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:
    """States, sums, writes and output of GPT-2 and of the user's post-norm model, in this code's own forward."""
    module: Any = found.module
    inputs: Any = found.inputs
    states, sums, writes = [], [], []

    def add(x: Tensor, write: Tensor, norm: Callable[[Tensor], Tensor]) -> Tensor:
        states.append(x)
        writes.append(write)
        sums.append(x + write)
        return norm(sums[-1])

    def same(x: Tensor) -> Tensor:
        return x

    if found.name == "gpt2":
        ids = inputs["input_ids"]
        body = module.transformer
        x = (body.wte(ids) + body.wpe(torch.arange(ids.shape[1]))).requires_grad_()
        for block in body.h:
            x = add(x, block.attn(block.ln_1(x))[0], same)
            x = add(x, block.mlp(block.ln_2(x)), same)
        output = module.lm_head(body.ln_f(x))
    else:
        x = (module.token(inputs) + module.position(torch.arange(len(inputs)))[:, None]).requires_grad_()
        for layer in module.layers:
            x = add(x, layer.attention(x, x, x)[0], layer.norm1)
            x = add(x, layer.linear2(layer.activation(layer.linear1(x))), layer.norm2)
        output = module.unembed(x).transpose(0, 1)
    return [*states, x], sums, writes, output


@pytest.mark.parametrize("name", ["gpt2", "user_post_norm"])
def test_equals_plain_autograd_on_a_forward_written_by_hand(name: str) -> None:
    found = case(name, DOUBLE)
    states, sums, writes, output = by_hand(found)
    ids: Tensor = found.inputs["input_ids"] if name == "gpt2" else found.inputs.T  # type: ignore[index,union-attr]
    targets = torch.full_like(ids, -1)
    targets[:, :-1] = ids[:, 1:]
    loss = torch.stack([F.cross_entropy(output[d, :-1], ids[d, 1:]) for d in range(len(ids))]).sum()
    first = name != "gpt2"

    def doc_first(tensor: Tensor) -> Tensor:
        return (tensor.transpose(0, 1) if first else tensor).flatten(0, 1)

    at_states = torch.autograd.grad(loss, states, retain_graph=True)
    at_sums = torch.autograd.grad(loss, sums, retain_graph=True)
    graph = graph_of(found, targets=targets)
    assert float(graph.losses.detach().sum()) == pytest.approx(float(loss.detach()), rel=1e-13)
    gradients = graph.gradients()
    for own, hand in zip(gradients, at_states, strict=True):
        assert relative(own, doc_first(hand)) < 1e-12
    for step, (write, state) in enumerate(zip(writes, states[:-1], strict=True)):
        pulled = graph.across(step, gradients[step + 1][None])
        assert relative(pulled.skip[0], doc_first(at_sums[step])) < 1e-12
        branch = torch.autograd.grad(write, state, at_sums[step], retain_graph=True)[0]
        assert relative(graph.through(step, pulled.writes[step])[0], doc_first(branch)) < 1e-12


@pytest.mark.parametrize(
    "name", ["gpt2", "bert", "inplace_add", "scaled_skip_parameter", "parallel_chain", "bart", "transformer_pre", "vit"]
)
def test_the_gradient_is_the_slope_of_the_objective(name: str) -> None:
    found = case(name, DOUBLE)
    for stream in found.anatomy.streams:
        gradients = graph_of(found, stream.name).gradients()
        shape = found.docs, length(found, stream.name)
        for index in {1, len(stream.steps) // 2, len(stream.steps)}:
            g = gradients[index] / gradients[index].norm()
            up, down = (_moved(found, stream.name, index, 1e-4 * sign * g, shape) for sign in (1, -1))
            assert (up - down) / 2e-4 == pytest.approx(float(gradients[index].norm()), rel=1e-5)


def _moved(found: Case, stream: str, index: int, change: Tensor, shape: tuple[int, int]) -> float:
    """The pooled norm of the last state where state `index` was moved, computed here."""
    head = found.anatomy.stream()

    def move(state: Tensor) -> Tensor:
        shift = change.reshape(*shape, -1)
        shift = shift.transpose(0, 1) if found.anatomy.stream(stream).position_first else shift
        return state + shift.reshape(state.shape)

    with torch.no_grad(), sl.edit(found.module, found.anatomy, states={index: move}, stream=stream):
        with observe(found.module, found.anatomy) as seen:
            invoke(found.module, found.inputs)
        last = seen.states[head.name][len(head.steps)]
    last = last.transpose(0, 1) if head.position_first else last
    return float(last.reshape(found.docs, -1, head.d_model).mean(1).square().sum() / 2)


# ---- laws ---------------------------------------------------------------------------------------------------------


def test_closed_branches_leave_the_gradient_alone() -> None:
    found = case("layer_scale", DOUBLE)
    module: Any = copy.deepcopy(found.module)
    for layer in module.layers:
        layer.gamma1.zero_()
        layer.gamma2.zero_()
    flow = gradient_flow(module, inputs=found.inputs, progress=False).flow
    assert np.abs(flow.skip_share - 1).max() < 1e-12
    assert np.abs(flow.branch_share).max() < 1e-12
    assert np.abs(flow.relative_norm - 1).max() < 1e-12
    assert np.abs(flow.identity_gain - 1).max() < 1e-12


@pytest.mark.parametrize("name", ["gpt2", "bert", "gemma2", "gptj", "granite", "parallel_chain", "deepnorm", "t5"])
def test_shares_sum_to_one(name: str) -> None:
    found = gradient_flow(case(name).module, inputs=case(name).inputs, progress=False)
    assert found.closure < 1e-5
    for flow in (found.flow, found.flow_all):
        total = flow.skip_share[:, 0].copy()
        np.add.at(total, list(found.steps), flow.branch_share[:, 0])
        np.testing.assert_allclose(total, 1, atol=1e-5)


def test_parallel_branches_share_a_step_and_its_skip() -> None:
    found = gradient_flow(case("gptj").module, inputs=case("gptj").inputs, progress=False)
    rows = found.rows()
    assert [row["step"] for row in rows] == [0, 0, 1, 1]
    assert rows[0]["skip_share"] == rows[1]["skip_share"]
    assert rows[0]["branch_share"] != rows[1]["branch_share"]


def test_only_norms_and_factors_on_the_stream_change_the_gradient_of_the_skips() -> None:
    pre = gradient_flow(case("gpt2").module, inputs=case("gpt2").inputs, progress=False)
    post = gradient_flow(case("bert").module, inputs=case("bert").inputs, progress=False)
    assert np.array_equal(pre.flow.identity_gain, np.ones_like(pre.flow.identity_gain))
    assert np.array_equal(pre.flow.norm_gain, np.ones_like(pre.flow.norm_gain))
    assert not pre.has_norms
    assert post.has_norms
    assert np.abs(post.flow.identity_gain[:-1] - 1).min() > 1e-3
    scaled = gradient_flow(
        case("scaled_skip_constant").module, inputs=case("scaled_skip_constant").inputs, progress=False
    )
    np.testing.assert_allclose(
        scaled.flow.identity_gain[:, 0], [(0.9 * 1.2) ** 2, 1.2 * 1.2 * 0.9, 1.2 * 0.9, 1.2, 1], rtol=1e-6
    )


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
    parts = [GradientFlow(source, 1, None) for _ in range(2)]
    parts[0].update(blocks[0])
    parts[1].update(blocks[1])
    parts[1].update(blocks[2])
    parts[0].merge(parts[1])
    whole = gradient_flow(found.module, inputs=found.inputs, at_once=3, progress=False)
    merged = parts[0].result()
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
    assert alone.loss[0] == alone.loss[1] == alone.loss[2]  # one document says nothing about others


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
    assert "first 2 sequences" in some.title
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
        GradientFlow(source, 1, None).result()
    lone = graph_of(found, targets=torch.full((found.docs, length(found, "main")), -1))
    assert float(lone.losses.detach().sum()) == 0
    assert all(float(g.norm()) == 0 for g in lone.gradients())


@pytest.mark.parametrize("options", [{"sequences": 0}, {"at_once": 0}])
def test_at_least_one_sequence(options: dict[str, Any]) -> None:
    found = case("gpt2")
    with pytest.raises(UsageError, match="at least one sequence"):
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
    assert "2 sequences of 1 documents" in table.stderr


@pytest.mark.parametrize("arguments", [["--max-length", "3"], ["--all", "--sequences", "2"]])
def test_options_that_contradict_each_other(arguments: list[str]) -> None:
    done = CliRunner().invoke(main, ["gradient", MODEL, *SMALL, *arguments])
    assert done.exit_code == 2
    assert "Traceback" not in done.stderr
