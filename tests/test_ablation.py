"""Layer drop: each run against a model built without the layer, against edits from the start, against plain loops."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import streamlens as sl
from streamlens.analyses.ablation.runs import Ordered, Runs, Setting, Spare, running
from streamlens.analyses.ablation.spans import Drop, Mode, every, in_modes, one_sublayer, together, whole_layer
from streamlens.analyses.ablation.study import Study
from streamlens.analyses.ablation.sweep import ablate
from streamlens.analyses.ablation.trials import MeanWrites
from streamlens.analyses.source import Source, source_of
from streamlens.calling import invoke
from streamlens.errors import UsageError
from streamlens.observation import tokens
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
    setting = Study.of(source, mode, progress=False).setting
    block = next(iter(source.blocks()))
    runs = Runs(setting, block, source.inputs(block), Spare())
    layers = every(source.stream, "layers", mode)
    drops = [*every(source.stream, "both", mode), together(layers), together([layers[0], layers[-1]])]
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
    assert [d.mode for d in result.drops] == [mode, "zero" if mode == "skip" else "skip"]
    assert result["layer 0"]["mode"] == mode  # the one that was asked for
    assert f"({' and '.join(d.mode for d in result.drops)})" in result.title
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


@pytest.mark.parametrize("name", ["gpt2", "llama", "gptj"])
def test_without_any_layer_the_head_reads_the_embedding(name: str) -> None:
    """T-D5, by the modules of each family and nothing of streams."""
    found = case(name)
    source, module, ids = live(found), found.module, found.inputs["input_ids"]  # type: ignore[index]
    runs = first_runs(source)
    model: Any = module.get_submodule("model" if name == "llama" else "transformer")
    with running():
        gone = runs.without(together(every(source.stream, "layers")))
        if name == "llama":
            expected = module.get_submodule("lm_head")(model.norm(model.embed_tokens(ids)))
        else:
            x = model.wte(ids) + (model.wpe.weight[: ids.shape[1]] if name == "gpt2" else 0.0)
            expected = module.get_submodule("lm_head")(model.ln_f(x))
    torch.testing.assert_close(gone, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["gpt2", "bert", "gptj", "t5"])
def test_layers_in_another_order(name: str) -> None:
    """T-D9, and the exchange itself against a model built that way."""
    found = case(name)
    source = live(found)
    runs = first_runs(source)
    order = list(range(source.stream.layers))
    with running():
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


def test_an_encoder_can_be_dropped_from_as_well() -> None:
    found = case("t5")
    source = live(found, stream="encoder")
    runs = first_runs(source)
    rebuilt = copy.deepcopy(found.module)
    blocks: Any = rebuilt.get_submodule("encoder.block")
    del blocks[1]
    with running():
        torch.testing.assert_close(runs.without(whole_layer(source.stream, 1)), invoke(rebuilt, runs.inputs))


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
    with pytest.raises(UsageError, match="two or more to a batch"):
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
    assert result.scores.units == 3
