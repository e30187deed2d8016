"""Layer drop: each run against a model built without the layer, against edits from the start, against plain loops."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import streamlens as sl
from fixtures import planted
from streamlens.analyses.ablation.runs import Dropped, Ordered, Runs, Setting, Spare, running
from streamlens.analyses.ablation.spans import Drop, Mode, chosen, every, in_modes, one_sublayer, together, whole_layer
from streamlens.analyses.ablation.sweep import AblationResult, ablate, setting_for
from streamlens.analyses.ablation.trials import Ablation, MeanWrites
from streamlens.analyses.source import Source, source_of, target_ids
from streamlens.calling import invoke
from streamlens.errors import MissingDataError, UsageError
from streamlens.observation import tokens
from streamlens.recorder.pilot import parameters_of
from tests.conftest import Case, case, taken

SHAPES = ["gpt2", "llama", "bert", "user_post_norm", "gemma2", "gptj", "granite", "t5", "transformer_pre", "deepnorm"]
PLAIN = ["gpt2", "llama", "gemma2", "gptj", "granite", "t5"]
"""Models in which nothing stands on the stream but additions."""


def live(found: Case, **options: Any) -> Source:
    options.setdefault("stream", "decoder" if found.name == "transformer_pre" else None)
    return source_of(found.module, inputs=found.inputs, **options)


def runs_of(source: Source, **options: Any) -> Iterator[Runs]:
    """Ready every block of a source."""
    setting = Setting.of(source, **options)
    for block in source.blocks():
        yield Runs(setting, block, source.inputs(block), Spare())


def first_runs(source: Source, **options: Any) -> Runs:
    return next(runs_of(source, **options))


def laid_out(output: Tensor, source: Source | Setting) -> Tensor:
    """Bring a model's own output into (doc, position, width)."""
    return output.transpose(0, 1) if source.anatomy.stream().position_first else output


def edited_from_the_start(runs: Runs, drop: Drop, keep_first: bool = False) -> Tensor:
    """Do the same with nothing but edits of one whole forward pass."""
    setting, stream = runs.setting, runs.setting.stream

    def replaced(index: int) -> Callable[[Tensor], Tensor]:
        mode: Mode = "zero" if drop.mode == "skip" else drop.mode
        return lambda old: kept(own(runs.instead(mode, index), old), old)

    states: dict[int, Callable[[Tensor], Tensor]] = {}
    writes: dict[int, Callable[[Tensor], Tensor]] = {}
    seen: dict[int, Tensor] = {}

    def own(tensor: Tensor, like: Tensor) -> Tensor:
        return (tensor.transpose(0, 1) if stream.position_first else tensor).reshape(like.shape)

    def kept(new: Tensor, old: Tensor) -> Tensor:
        if not keep_first:
            return new
        docs, positions = runs.shape
        merged = tokens(new, stream, docs, positions).clone()
        merged[:, 0] = tokens(old, stream, docs, positions)[:, 0]
        return own(merged, old)

    def remember(index: int) -> Callable[[Tensor], Tensor]:
        def change(old: Tensor) -> Tensor:
            new = kept(seen[index - 1].reshape(old.shape), old) if skipped(index - 1) else old
            seen[index] = new.clone()
            return new.clone()

        return change

    def skipped(step: int) -> bool:
        return step >= 0 and drop.mode == "skip" and set(stream.steps[step].sublayers) <= set(drop.sublayers)

    for step, recorded in enumerate(stream.steps):
        if skipped(step):
            states[step] = remember(step)
            states[step + 1] = remember(step + 1)
        else:
            for s in set(recorded.sublayers) & set(drop.sublayers):
                writes[s] = replaced(s)
    states = {index: change for index, change in states.items() if stream.states[index].made is not None}
    if 0 in {step for step in range(len(stream.steps)) if skipped(step)} and stream.states[0].made is None:
        seen[0] = runs.state(0)
    with sl.edit(setting.module, setting.anatomy, writes=writes, states=states, stream=stream.name):
        return laid_out(invoke(setting.module, runs.inputs), setting)


# ---- what a run computes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["skip", "zero", "mean", "resample"])
@pytest.mark.parametrize("name", SHAPES)
def test_a_run_from_stored_states_equals_edits_from_the_start_bit_for_bit(name: str, mode: Mode) -> None:
    source = live(case(name))
    setting = setting_for(source, mode, protect_first=False, seed=0, progress=False)
    block = next(iter(source.blocks()))
    runs = Runs(setting, block, source.inputs(block), Spare())
    layers = every(source.stream, "layers", mode)
    drops = [*every(source.stream, "all", mode), together(layers), together([layers[0], layers[-1]])]
    drops.append(together([one_sublayer(source.stream, 0, mode), one_sublayer(source.stream, -1, mode)]))
    with running():
        baseline = laid_out(invoke(setting.module, runs.inputs), setting)
        for drop in drops:
            found = runs.without(drop)
            assert torch.equal(found, edited_from_the_start(runs, drop)), drop
            assert not torch.equal(found, baseline), drop


@pytest.mark.parametrize("name", SHAPES)
def test_position_0_is_protected(name: str) -> None:
    source = live(case(name))
    runs = first_runs(source, protect_first=True)
    with running():
        for drop in [*every(source.stream), together(every(source.stream, "layers"))]:
            found, expected = runs.without(drop), edited_from_the_start(runs, drop, keep_first=True)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
            if source.causal:
                torch.testing.assert_close(found[:, 0], runs.baseline()[:, 0], rtol=1e-4, atol=1e-5)


LISTS = {
    "gpt2": "transformer.h",
    "nanogpt": "transformer.h",
    "llama": "model.layers",
    "gemma2": "model.layers",
    "granite": "model.layers",
    "gptj": "transformer.h",
    "bert": "bert.encoder.layer",
    "user_post_norm": "layers",
    "deepnorm": "layers",
    "t5": "decoder.block",
}


@pytest.mark.parametrize("name", LISTS)
def test_a_skipped_layer_equals_a_model_built_without_it(name: str) -> None:
    """T-D6. The oracle knows nothing of streams: it deletes the block from a copy and runs that."""
    found = case(name)
    source = live(found)
    runs = first_runs(source)
    # The first block of T5 owns the position bias of all others, so it cannot be cut out of the model.
    for layer in range(1 if name == "t5" else 0, source.stream.layers):
        rebuilt = copy.deepcopy(found.module)
        blocks: Any = rebuilt.get_submodule(LISTS[name])
        del blocks[layer]
        if kinds := getattr(getattr(rebuilt, "config", None), "layer_types", None):
            del kinds[layer]  # local and global attention alternate, and each layer keeps its own
        with running():
            expected = laid_out(invoke(rebuilt, runs.inputs), source)
            actual = runs.without(whole_layer(source.stream, layer))
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PLAIN)
def test_skip_and_zero_are_the_same_bits_where_only_sums_stand_on_the_stream(name: str) -> None:
    """T-D2."""
    source = live(case(name))
    runs = first_runs(source)
    with running():
        for skip, zero in zip(every(source.stream), every(source.stream, mode="zero"), strict=True):
            assert torch.equal(runs.without(skip), runs.without(zero))
    assert {d.mode for d in in_modes(source.stream, every(source.stream), runs.setting.parameters)} == {"skip"}


@pytest.mark.parametrize("name", ["bert", "user_post_norm", "deepnorm", "scaled_skip_constant"])
@pytest.mark.parametrize("mode", ["skip", "zero"])
def test_both_are_reported_where_they_differ(name: str, mode: Mode) -> None:
    """T-D3: with an affine norm after the addition, or a factor on the skip, they are two questions."""
    found = case(name)
    result = ablate(found.module, [0], mode, inputs=found.inputs, progress=False)
    assert [d.mode for d in result.drops] == ["skip", "zero"]
    assert abs(np.diff(result.scores.mean("kl"))[0]) > (1e-4 if name == "scaled_skip_constant" else 1e-2)


def test_skip_is_almost_zero_behind_a_norm_that_does_nothing() -> None:
    """T-D3: without gain and bias, the norm after the addition finds its own output and leaves it as it is."""
    module = copy.deepcopy(case("user_post_norm").module)
    for child in module.modules():
        if isinstance(child, nn.LayerNorm):
            nn.init.ones_(child.weight)
            nn.init.zeros_(child.bias)
    source = source_of(module, inputs=case("user_post_norm").inputs)
    runs = first_runs(source)
    with running():
        skip = runs.without(one_sublayer(source.stream, 2))
        zero = runs.without(one_sublayer(source.stream, 2, "zero"))
    torch.testing.assert_close(skip, zero, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", SHAPES)
def test_nothing_dropped_is_the_model_itself_and_nothing_stays_behind(name: str) -> None:
    """T-D4."""
    found = case(name)
    source = live(found)
    with running():
        for runs in runs_of(source):
            plain = laid_out(invoke(found.module, runs.inputs), source)
            assert torch.equal(runs.baseline(), plain)
            assert torch.equal(runs.without(Drop("nothing", "several", (), ())), plain)
            runs.without(whole_layer(source.stream, 0))
            assert torch.equal(laid_out(invoke(found.module, runs.inputs), source), plain)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in found.module.modules())


@pytest.mark.parametrize("name", PLAIN)
def test_without_any_layer_the_head_reads_the_embedding(name: str) -> None:
    """T-D5."""
    source = live(case(name))
    runs = first_runs(source)
    with running():
        gone = runs.without(together(every(source.stream, "layers")))
        assert torch.equal(gone, runs.finish(runs.last, runs.state(0)))


@pytest.mark.parametrize("name", ["gpt2", "bert", "gptj", "t5"])
def test_layers_in_another_order(name: str) -> None:
    """T-D9, and the exchange itself against a model built that way."""
    found = case(name)
    source = live(found)
    runs = first_runs(source)
    order = list(range(source.stream.layers))
    with running():
        assert torch.equal(Ordered("same", tuple(order)).run(runs), runs.baseline())
        without_last = Ordered("", tuple(order[:-1])).run(runs)
        assert torch.equal(without_last, runs.without(whole_layer(source.stream, order[-1])))
        if name == "t5":
            return
        rebuilt = copy.deepcopy(found.module)
        blocks: Any = rebuilt.get_submodule(LISTS[name])
        swapped = [order[1], order[0], *order[2:]]
        parts = list(blocks)
        for place, layer in enumerate(swapped):
            blocks[place] = parts[layer]
        expected = laid_out(invoke(rebuilt, runs.inputs), source)
        torch.testing.assert_close(runs.ordered(swapped), expected, rtol=1e-5, atol=1e-5)


# ---- what takes the place of a write --------------------------------------------------------------------------------


def test_mean_is_over_all_tokens_but_the_first_of_each_window(tmp_path: Path) -> None:
    with taken(case("gpt2"), tmp_path / "x.h5") as capture:
        source = source_of(capture)
        write, later = capture.write(3).double(), capture.tokens.position > 0
        for per_position, expected in (
            (False, write[later].mean(0, keepdim=True)),
            (True, torch.stack([write[capture.tokens.position == p].mean(0) for p in range(11)])),
        ):
            whole, halves = (MeanWrites(6, per_position=per_position) for _ in range(2))
            for index, block in enumerate(source.blocks()):
                whole.update(block)
                half = MeanWrites(6, per_position=per_position)
                half.update(block)
                halves.merge(half) if index else halves.update(block)
            torch.testing.assert_close(whole.result()[3].double(), expected, rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(halves.result(), whole.result())


def test_resample_gives_nobody_their_own_write() -> None:
    source = live(case("gpt2"))
    runs = first_runs(source, needs_spare=True)
    own, given = runs.block.writes[0].reshape(*runs.shape, -1), runs.instead("resample", 0)
    origin = [next(d for d in range(len(own)) if torch.equal(given[doc], own[d])) for doc in range(len(own))]
    assert sorted(origin) == list(range(len(own)))
    assert all(doc != other for doc, other in enumerate(origin))


def test_resample_among_equal_documents_is_the_model_itself() -> None:
    """T-D10."""
    found = case("llama")
    ids: Any = found.inputs
    same = {**ids, "input_ids": ids["input_ids"][:1].expand(3, -1)}
    result = ablate(found.module, mode="resample", inputs=same, progress=False)
    assert not result.scores.sums["delta_loss"].any()


def test_resample_of_documents_one_by_one_takes_the_one_before(tmp_path: Path) -> None:
    found = case("gpt2")
    with pytest.raises(UsageError, match="larger --batch-tokens"):
        ablate(found.module, mode="resample", inputs=found.inputs, batch_tokens=1, progress=False)
    # Two documents in the first batch, one in the second.
    result = ablate(found.module, [1], "resample", inputs=found.inputs, batch_tokens=22, progress=False)
    source = source_of(found.module, inputs=found.inputs, batch_tokens=22)
    first, second = source.blocks()
    spare = Spare()
    spare.keep(first)
    runs = Runs(Setting.of(source), second, source.inputs(second), spare)
    write = first.writes[2].reshape(2, 11, -1)[1]
    assert torch.equal(runs.instead("resample", 2)[0], write)
    assert len(result.scores.doc) == 3


# ---- scores ---------------------------------------------------------------------------------------------------------


def by_hand(full: Tensor, changed: Tensor, targets: Tensor) -> dict[str, float]:
    """All scores by loops over tokens, in float64, without position 0."""
    deltas, kls, agree = [], [], []
    for doc in range(full.shape[0]):
        for position in range(1, full.shape[1]):
            p, q = full[doc, position].double().log_softmax(-1), changed[doc, position].double().log_softmax(-1)
            kls.append(sum(math.exp(a) * (a - b) for a, b in zip(p.tolist(), q.tolist(), strict=True)))
            agree.append(float(p.argmax() == q.argmax()))
            target = int(targets[doc, position])
            if target >= 0:
                deltas.append(float(p[target] - q[target]))
    return {"delta_loss": np.mean(deltas), "kl": np.mean(kls), "top1_agreement": np.mean(agree)}


@pytest.mark.parametrize("name", ["gpt2", "bert", "gemma2", "gptj", "t5", "user_post_norm"])
def test_scores_equal_plain_loops(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamlens.analyses.ablation.scores.CHUNK", 300)  # several pieces, the last one short
    found = case(name)
    source = live(found)
    result = ablate(source, progress=False)
    (runs,) = runs_of(source)
    targets = target_ids(source, runs.block).reshape(runs.shape)
    for index, drop in enumerate(result.drops):
        with running():
            expected = by_hand(runs.baseline(), runs.without(drop), targets)
        row = result.rows()[index]
        for score, value in expected.items():
            assert row[score] == pytest.approx(value, abs=2e-5), (drop, score)
        assert row["perplexity_ratio"] == pytest.approx(math.exp(expected["delta_loss"]), rel=1e-4)
        assert row["kl"] >= -1e-6


def test_pooled_distance_equals_plain_loops() -> None:
    found = case("transformer_pre")
    source = live(found)
    result = ablate(source, progress=False)
    runs = first_runs(source)
    for index, drop in enumerate(result.drops):
        with running():
            full, changed = runs.baseline().double(), runs.without(drop).double()
        distances = []
        for doc in range(len(full)):
            a, b = full[doc].mean(0), changed[doc].mean(0)
            distances.append(1 - float(a @ b / (a.norm() * b.norm())))
        assert result.rows()[index]["pooled_distance"] == pytest.approx(np.mean(distances), abs=1e-12)
    assert "delta_loss" not in result.rows()[0]


def test_the_interval_is_over_documents_and_paired() -> None:
    """Against numpy alone: the same draws of documents, each with its own sum of differences."""
    ids = torch.randint(5, 97, (12, 11), generator=torch.Generator().manual_seed(0))
    result = ablate(case("nanogpt").module, [1], tokens=list(ids), window=11, progress=False)
    sums, counts = result.scores.columns("delta_loss")
    assert result.scores.unit == "document"
    assert counts.tolist() == [9.0] * 12  # eleven positions, less the first, and the last has no target
    draws = np.random.default_rng(0).multinomial(12, np.full(12, 1 / 12), size=1000)
    means = sorted((draw * sums[0]).sum() / (draw * counts).sum() for draw in draws)
    row = result.rows()[0]
    assert row["low"] == pytest.approx(np.quantile(means, 0.025))
    assert row["high"] == pytest.approx(np.quantile(means, 0.975))
    assert row["low"] < row["delta_loss"] < row["high"]


def test_windows_of_one_document_are_joined_where_there_are_documents_enough() -> None:
    ids = [torch.randint(5, 97, (22,), generator=torch.Generator().manual_seed(doc)) for doc in range(10)]
    result = ablate(case("nanogpt").module, [1], tokens=ids, window=11, progress=False)
    assert result.scores.unit == "document"
    sums, counts = result.scores.columns("delta_loss")
    assert sums.shape == (1, 10)
    assert counts.tolist() == [18.0] * 10  # of eleven positions the first is left out and the last has no target
    windows = result.scores.sums["delta_loss"][0, 0].reshape(10, 2)
    # Other sums for every window, so that one in the wrong document is noticed.
    assert len(set(windows.flatten().round(6))) == 20
    np.testing.assert_allclose(sums[0], windows.sum(1), rtol=1e-12)
    fewer = ablate(case("nanogpt").module, [1], tokens=ids[:9], window=11, progress=False)
    assert fewer.scores.unit == "window"
    assert fewer.scores.columns("delta_loss")[0].shape == (1, 18)


# ---- sources --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_a_file_and_a_live_model_give_the_same(name: str, tmp_path: Path) -> None:
    found = case(name)
    if name in ("deepnorm", "user_post_norm", "transformer_pre"):
        options: dict[str, Any] = {"inputs": found.inputs}
    else:
        ids: Any = found.inputs if isinstance(found.inputs, Tensor) else found.inputs["input_ids"]
        options = {"tokens": list(ids), "window": ids.shape[1]}
    stream = "decoder" if name == "transformer_pre" else None
    model = sl.load(found.module)
    from_model = ablate(model, progress=False, batch_tokens=22, stream=stream, **options)
    for compact in (False, True):
        path = tmp_path / f"{compact}.h5"
        kept = stream and [stream]
        with sl.capture(model, out=path, batch_tokens=22, streams=kept, compact=compact, progress=False, **options):
            pass
        if name == "transformer_pre":
            with pytest.raises(MissingDataError, match="not token ids"):
                ablate(path, model=model, progress=False)
            continue
        from_file = ablate(path, model=model, progress=False)
        assert from_file.drops == from_model.drops
        for score, sums in from_model.scores.sums.items():
            np.testing.assert_array_equal(from_file.scores.sums[score], sums)
        for proxy, values in from_model.proxies.items():
            np.testing.assert_allclose(from_file.proxies[proxy], values, rtol=1e-6)


def test_two_halves_merge_to_the_whole(tmp_path: Path) -> None:
    with taken(case("gpt2"), tmp_path / "x.h5") as capture:
        source = source_of(capture, model=sl.load(case("gpt2").module))
        setting = Setting.of(source)
        trials = [Dropped(d) for d in every(source.stream)]
        whole, late, early = (Ablation(source, setting, trials) for _ in range(3))
        blocks = list(source.blocks())
        assert len(blocks) == 3
        for block in blocks:
            whole.update(block)
            (early if block is blocks[0] else late).update(block)
        late.merge(early)
        for name, sums in whole.result().sums.items():
            np.testing.assert_array_equal(late.result().sums[name], sums)
        np.testing.assert_array_equal(late.result().doc, whole.result().doc)


def test_an_encoder_can_be_dropped_from_as_well() -> None:
    found = case("t5")
    source = live(found, stream="encoder")
    runs = first_runs(source)
    rebuilt = copy.deepcopy(found.module)
    blocks: Any = rebuilt.get_submodule("encoder.block")
    del blocks[1]
    with running():
        torch.testing.assert_close(runs.without(whole_layer(source.stream, 1)), invoke(rebuilt, runs.inputs))


# ---- planted truth --------------------------------------------------------------------------------------------------


def of_planted(net: nn.Module, **options: Any) -> AblationResult:
    return ablate(net, tokens=list(planted.documents()), window=planted.POSITIONS, progress=False, **options)


def test_a_dead_layer_makes_no_difference_at_all() -> None:
    """T-D1."""
    row = of_planted(planted.dead_layer())["layer 1"]
    assert (row["delta_loss"], row["low"], row["high"], row["kl"]) == (0.0, 0.0, 0.0, 0.0)
    assert (row["top1_agreement"], row["perplexity_ratio"]) == (1.0, 1.0)
    assert (row["block_influence"], row["relative_write"], row["angular_distance"]) == (0.0, 0.0, 0.0)


def test_a_serial_pair_is_indispensable_and_a_backup_pair_is_not() -> None:
    alone = math.log(1 + 11 * math.exp(-planted.STRENGTH))
    lost = math.log(planted.VOCAB) - alone
    both = math.log(1 + 11 * math.exp(-2 * planted.STRENGTH))
    serial, backup = of_planted(planted.serial_pair()), of_planted(planted.backup_pair())
    for layer in (0, 2):
        assert serial[f"layer {layer}"]["delta_loss"] == pytest.approx(lost, rel=1e-5)
        assert backup[f"layer {layer}"]["delta_loss"] == pytest.approx(alone - both, rel=1e-4)


# ---- names and mistakes ---------------------------------------------------------------------------------------------


def test_names_of_what_is_dropped() -> None:
    stream = case("gpt2").anatomy.stream()
    assert chosen(stream, 1).sublayers == (2, 3)
    assert chosen(stream, "0-1").label == "layers 0-1"
    assert chosen(stream, ["0", "2"]).label == "layers 0,2"
    assert chosen(stream, "1.mlp") == chosen(stream, "1_mlp_out") == one_sublayer(stream, 3)
    assert chosen(stream, "0,2.attn").sublayers == (0, 1, 4)
    assert chosen(stream, ["0", "0.attn"]).sublayers == (0, 1)


@pytest.mark.parametrize(
    ("drop", "message"),
    [
        (9, "has layers 0 to 2, not 9"),
        ("2-9", "has layers 0 to 2, not 3"),
        ("2-1", "empty range"),
        ("1.mixer", "has no '1.mixer'; that layer has 1.attn, 1.mlp"),
        ("9.attn", "has layers 0 to 2, not 9"),
        ("attention", "names nothing to drop"),
        ([], "nothing is named"),
    ],
)
def test_a_drop_that_does_not_exist(drop: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ablate(case("gpt2").module, drop, inputs=case("gpt2").inputs, progress=False)


def test_other_mistakes(tmp_path: Path) -> None:
    found = case("gpt2")
    with pytest.raises(UsageError, match="no mode 'off'"):
        ablate(found.module, mode="off", inputs=found.inputs, progress=False)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="units are"):
        ablate(found.module, units="heads", inputs=found.inputs, progress=False)
    model = sl.load(found.module)
    ids: Any = found.inputs
    options: dict[str, Any] = {"tokens": list(ids["input_ids"]), "window": 11, "progress": False}
    with sl.capture(model, out=tmp_path / "some.h5", layers=[1], **options) as narrowed:
        assert ablate(narrowed, [1], model=model, progress=False).scores.sums["kl"].all()
        with pytest.raises(MissingDataError, match="was narrowed") as caught:
            ablate(narrowed, [0], model=model, progress=False)
        assert "capture the whole stream" in caught.value.__notes__[0]
    with (
        sl.capture(model, out=tmp_path / "late.h5", positions=[5, 6], **options) as late,
        pytest.raises(MissingDataError, match="begin at position 0"),
    ):
        ablate(late, model=model, progress=False)
    other = copy.deepcopy(found.module)
    nn.init.zeros_(other.get_parameter("transformer.ln_f.bias"))
    with (
        sl.capture(model, out=tmp_path / "whole.h5", **options) as whole,
        pytest.raises(MissingDataError, match="give the model of the capture"),
    ):
        ablate(whole, model=sl.load(other), progress=False)


def test_parameters_of_a_plain_stream_are_not_needed_to_know_that_it_is_plain() -> None:
    source = live(case("gpt2"))
    assert in_modes(source.stream, every(source.stream), {}) == every(source.stream)
    assert len(in_modes(source.stream, every(source.stream), parameters_of(case("gpt2").module))) == 9
