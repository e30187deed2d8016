"""Scores of a drop and their intervals: against loops over tokens, over documents, and over draws."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import streamlens as sl
from fixtures import planted
from streamlens.analyses.ablation.runs import Dropped, Setting, running
from streamlens.analyses.ablation.spans import chosen, every, in_modes, one_sublayer
from streamlens.analyses.ablation.sweep import AblationResult, ablate
from streamlens.analyses.ablation.trials import Ablation
from streamlens.analyses.source import source_of, target_ids
from streamlens.analyses.statistics import times_drawn
from streamlens.errors import MissingDataError, UsageError
from streamlens.recorder.pilot import parameters_of
from tests.conftest import case, taken
from tests.test_ablation import SHAPES, first_runs, live, runs_of

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


@pytest.mark.parametrize("documents", [9, 10])
def test_the_interval_is_over_documents_or_else_windows_and_paired(documents: int) -> None:
    """Ten documents of two windows: drawn again by loops over documents; of nine, over their windows."""
    ids = [torch.randint(5, 97, (22,), generator=torch.Generator().manual_seed(doc)) for doc in range(documents)]
    source = source_of(case("nanogpt").module, tokens=ids, window=11)
    result = ablate(source, [1], progress=False)
    (drop,) = result.drops
    deltas, first = [], []
    for runs in runs_of(source):
        with running():
            full, changed = (x.double().log_softmax(-1) for x in (runs.baseline(), runs.without(drop)))
        targets = target_ids(source, runs.block).reshape(runs.shape)[:, 1:-1, None]
        deltas += [float(d) for d in (full - changed)[:, 1:-1].gather(-1, targets).sum((1, 2))]
        first += [runs.block.start + 11 * window for window in range(runs.shape[0])]
    assert first == list(range(0, 22 * documents, 11))
    sums, counts = np.zeros(1000), np.zeros(1000)
    for window, delta in enumerate(deltas):
        # Of eleven positions the first is left out and the last has no target.
        times = times_drawn(0, window // 2 if documents == 10 else 11 * window)
        sums, counts = sums + delta * times, counts + 9.0 * times
    (row,) = result.rows()
    assert row["interval_over"] == result.scores.unit == ("document" if documents == 10 else "window")
    assert result.scores.units == (10 if documents == 10 else 18)
    assert f"95 % intervals over {result.scores.units} {row['interval_over']}s" in result.title
    assert (row["low"], row["high"]) == pytest.approx(np.quantile(sums / counts, [0.025, 0.975]), abs=1e-6)
    assert row["low"] < row["delta_loss"] < row["high"]


def test_what_is_kept_does_not_grow_with_the_text() -> None:
    """Apart from one byte a document, the sums are the same few arrays after two blocks and after twenty."""
    source = source_of(case("nanogpt").module, tokens=torch.arange(5, 93).repeat(5), window=11, batch_tokens=22)
    kept = Ablation(source, Setting.of(source), [Dropped(d) for d in every(source.stream)])
    sizes = []
    for block in source.blocks():
        kept.update(block)
        sizes.append(sum(array.nbytes for array in arrays(kept._tally)))
    assert len(sizes) == 20
    assert len(set(sizes[1:])) == 1


def arrays(kept: Any) -> list[Any]:
    """All arrays inside an object."""
    if isinstance(kept, np.ndarray):
        return [kept]
    inner = kept.values() if isinstance(kept, dict) else vars(kept).values() if hasattr(kept, "__dict__") else ()
    return [array for value in inner for array in arrays(value)]


class Hidden(nn.Module):
    """A stream of two layers whose head hides the last three tokens of the vocabulary behind minus infinity."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def drawn(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator))

        self.wte = nn.Embedding(23, 8, _weight=drawn(23, 8))
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        for layer in self.layers:
            layer.weight, layer.bias = drawn(8, 8), drawn(8)
        self.head = nn.Linear(8, 23, bias=False)
        self.head.weight = drawn(23, 8)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        found: Tensor = self.head(x).masked_fill(torch.arange(23) > 19, -torch.inf)
        return found


def test_tokens_that_the_head_hides_count_for_nothing() -> None:
    """KL by a loop over the tokens that can be chosen: 0 log 0 is 0."""
    module = Hidden().eval()
    ids = torch.randint(0, 20, (2, 6), generator=torch.Generator().manual_seed(1))
    found = ablate(module, [1], tokens=list(ids), window=6, progress=False)
    with torch.no_grad():
        full = module(ids)[:, 1:, :20].double().log_softmax(-1)
        x = module.wte(ids)
        x = x + torch.tanh(module.layers[0](x))
        changed = module.head(x)[:, 1:, :20].double().log_softmax(-1)
    (row,) = found.rows()
    expected = [
        sum(math.exp(a) * (a - b) for a, b in zip(p.tolist(), q.tolist(), strict=True))
        for p, q in zip(full.flatten(0, 1), changed.flatten(0, 1), strict=True)
    ]
    assert row["kl"] == pytest.approx(np.mean(expected), rel=1e-5)
    targets = ids[:, 2:, None]
    gained = (full - changed)[:, :-1].gather(-1, targets)
    assert row["delta_loss"] == pytest.approx(float(gained.mean()), rel=1e-5)


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
            np.testing.assert_array_equal(from_file.scores.intervals(score), from_model.scores.intervals(score))
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
        merged, expected = late.result(), whole.result()
        assert (merged.unit, merged.units) == (expected.unit, expected.units)
        for name, sums in expected.sums.items():
            np.testing.assert_allclose(merged.sums[name], sums, rtol=1e-12, atol=1e-15)
            assert np.isfinite(expected.intervals(name)).all()
            np.testing.assert_allclose(merged.intervals(name), expected.intervals(name), rtol=1e-9, atol=1e-14)


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
    with pytest.raises(UsageError, match="units of a sweep are layers, sublayers or both, not 'heads'"):
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
        pytest.raises(MissingDataError, match="capture without --positions"),
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
