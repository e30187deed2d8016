"""Blocks, pairs, swaps, greedy orders and effects: each against runs of its own, identities and planted truth."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import streamlens as sl
from fixtures import planted
from streamlens.analyses.ablation.blocks import ablate_blocks
from streamlens.analyses.ablation.greedy import GREEDY, INFLUENCE, drop_greedily
from streamlens.analyses.ablation.orders import swap_neighbours
from streamlens.analyses.ablation.pairs import PairsResult, ablate_pairs
from streamlens.analyses.ablation.proxies import rank_correlation
from streamlens.analyses.ablation.repair import Effects, effects
from streamlens.analyses.ablation.runs import Runs, Setting, running
from streamlens.analyses.ablation.spans import Drop, every, layer_span, together
from streamlens.analyses.ablation.sweep import ablate
from streamlens.analyses.source import Source, source_of, target_ids
from streamlens.errors import MissingDataError, UsageError
from tests.conftest import Case, case

PLANTED: dict[str, Any] = {"tokens": list(planted.documents()), "window": planted.POSITIONS, "progress": False}
ROUNDED = {"rtol": 1e-4, "atol": 2e-5}


def live(found: Case, **options: Any) -> Source:
    return source_of(found.module, inputs=found.inputs, **options)


def one(source: Source, drop: list[int | str] | str, mode: Any = "skip", **options: Any) -> Any:
    """The score of one drop, by a run of its own."""
    found = ablate(source, drop, mode, progress=False, **options)
    row = [d.mode for d in found.drops].index(mode)
    return found.scores.mean(found.scores.headline)[row]


# ---- pairs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["skip", "zero", "mean", "resample"])
@pytest.mark.parametrize("name", ["gpt2", "bert", "gptj", "user_post_norm", "t5"])
@pytest.mark.parametrize("units", ["layers", "sublayers"])
def test_a_pair_is_what_dropping_both_in_one_run_gives(name: str, mode: Any, units: str) -> None:
    source = live(case(name))
    found = ablate_pairs(source, mode, units=units, progress=False)
    labels = [u.label.removeprefix("layer ") for u in found.units]
    mean, count = found.scores.mean(found.scores.headline), len(labels)
    for index, label in enumerate(labels):
        assert mean[index] == pytest.approx(one(source, label, mode), abs=2e-5)
    for (i, j), both in list(zip(found.pairs, mean[count:], strict=True))[:8]:
        assert both == pytest.approx(one(source, [labels[i], labels[j]], mode), abs=2e-5), (labels[i], labels[j])
        assert found.interaction[i, j] == found.interaction[j, i] == both - mean[i] - mean[j]


@pytest.mark.parametrize("name", ["gpt2", "albert"])
def test_a_pair_with_position_0_protected(name: str) -> None:
    source = live(case(name))
    found = ablate_pairs(source, protect_first=True, progress=False)
    both = found.scores.mean("delta_loss")[len(found.units)]
    assert both == pytest.approx(one(source, [0, 1], protect_first=True), abs=2e-5)
    assert both != pytest.approx(one(source, [0, 1]), abs=1e-3)


def interaction(net: nn.Module) -> PairsResult:
    return ablate_pairs(net, **PLANTED)


def test_backups_interact_positively_and_a_series_negatively() -> None:
    """T-D7."""
    backup, serial = interaction(planted.backup_pair()), interaction(planted.serial_pair())
    assert backup.interaction[0, 2] > 2.0
    assert serial.interaction[0, 2] == pytest.approx(-serial.alone[0], rel=1e-6)
    for found in (backup, serial):
        assert found.interaction[0, 1] == pytest.approx(0.0, abs=1e-7)  # the layer between writes nothing
        assert {found.rows()[0]["first"], found.rows()[0]["second"]} == {"layer 0", "layer 2"}
        assert found.rows()[0]["low"] <= found.rows()[0]["interaction"] <= found.rows()[0]["high"]


class Constant(nn.Module):
    """A layer that writes the same whatever it reads."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.up = nn.Linear(3 * planted.VOCAB, 4)
        self.down = nn.Linear(4, 3 * planted.VOCAB)
        nn.init.zeros_(self.up.weight)
        with torch.no_grad():
            self.down.bias.copy_(torch.randn(3 * planted.VOCAB, generator=torch.Generator().manual_seed(seed)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        written: torch.Tensor = self.down(torch.relu(self.up(x)))
        return x + written


def constant_net() -> nn.Module:
    net = planted.dead_layer()
    net.layers = nn.ModuleList([Constant(seed) for seed in range(3)])
    return net.eval()


def test_constant_writes_do_not_interact_in_a_linear_score() -> None:
    """T-D7: the logit of the target is linear in what is written, so there is a direct effect and nothing else."""
    found = effects(constant_net(), **PLANTED)
    np.testing.assert_allclose(found.means["indirect"], 0.0, atol=1e-9)
    assert np.abs(found.means["direct"]).max() > 0.1
    source = source_of(constant_net(), **{k: v for k, v in PLANTED.items() if k != "progress"})
    runs = next(iter_runs(source))
    layers = every(source.stream, "layers")
    with running():
        full = runs.baseline()
        alone = [full - runs.without(layer) for layer in layers]
        both = full - runs.without(together([layers[0], layers[2]]))
    torch.testing.assert_close(both, alone[0] + alone[2], rtol=0, atol=2e-6)


def iter_runs(source: Source) -> Any:
    setting = Setting.of(source)
    return (Runs(setting, block, source.inputs(block)) for block in source.blocks())


# ---- blocks, swaps --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "bert", "gemma3"])
def test_blocks_equal_runs_of_their_own(name: str) -> None:
    source = live(case(name))
    found = ablate_blocks(source, progress=False)
    count = source.stream.layers
    assert found.grid.shape == (max(1, count - 1), count)
    for length in range(1, count):
        for start in range(count - length + 1):
            expected = one(source, f"{start}-{start + length - 1}")
            assert found.grid[length - 1, start] == pytest.approx(expected, abs=2e-5)
        assert np.isnan(found.grid[length - 1, count - length + 1 :]).all()


def test_the_best_block_is_the_one_that_costs_least(tmp_path: Path) -> None:
    found = ablate_blocks(live(case("gpt2")), [2, 1], progress=False)
    for row in found.best():
        scores = found.grid[row["length"] - 1]
        assert row["delta_loss"] == np.nanmin(scores) == scores[row["start"]]
        assert row["delta_loss_by_angle"] == scores[row["start_by_angle"]]
    rows = [r for r in found.rows() if r["length"] == 2]
    assert min(rows, key=lambda r: r["angular_distance"])["start"] == found.best()[1]["start_by_angle"]
    with pytest.raises(UsageError, match="a block has 1 to 3, not 4"):
        ablate_blocks(live(case("gpt2")), [4], progress=False)


def test_swaps_equal_layers_that_changed_places() -> None:
    found = case("gpt2")
    source = live(found)
    result = swap_neighbours(source, progress=False)
    for layer, row in enumerate(result.rows()):
        rebuilt = copy.deepcopy(found.module)
        blocks: Any = rebuilt.get_submodule("transformer.h")
        blocks[layer], blocks[layer + 1] = blocks[layer + 1], blocks[layer]
        swapped = source_of(rebuilt, inputs=found.inputs)
        losses = [ablate(s, [0], progress=False).scores.base_loss for s in (swapped, source)]
        assert row["delta_loss"] == pytest.approx(losses[0] - losses[1], abs=2e-5)
    with pytest.raises(UsageError, match="one layer"):
        swap_neighbours(planted.WiredNet([None]).eval(), **PLANTED)


def test_swapping_what_was_built_the_wrong_way_round_gives_the_model_itself() -> None:
    """T-D9: the layers are exchanged in a copy of the module, and exchanged back by the run."""
    found = case("gpt2")
    rebuilt = copy.deepcopy(found.module)
    blocks: Any = rebuilt.get_submodule("transformer.h")
    blocks[1], blocks[2] = blocks[2], blocks[1]
    source = source_of(rebuilt, inputs=found.inputs)
    back = swap_neighbours(source, progress=False).swaps[1]
    with running():
        expected = next(iter_runs(live(found))).baseline()
        torch.testing.assert_close(back.run(next(iter_runs(source))), expected, rtol=1e-5, atol=1e-5)
        assert float((next(iter_runs(source)).baseline() - expected).abs().max()) > 1e-3


# ---- greedy ---------------------------------------------------------------------------------------------------------


def test_greedy_takes_the_cheapest_layer_each_time() -> None:
    source = live(case("gemma3"))
    found = drop_greedily(source, 3, random_orders=2, progress=False)
    gone: list[int | str] = []
    for number, layer in enumerate(found.orders[GREEDY]):
        costs = {other: one(source, [*gone, other]) for other in range(3) if other not in gone}
        assert layer == min(costs, key=lambda k: costs[k])
        gone.append(layer)
        row = [r for r in found.rows() if r["order"] == GREEDY][number]
        assert (row["dropped"], row["layer"]) == (number + 1, layer)
        assert row["delta_loss"] == pytest.approx(costs[layer], abs=2e-5)
    for order in found.orders.values():
        assert sorted(order) == [0, 1, 2]
        # Without all of them it does not matter in which order they went.
    ends = [float(s.mean("delta_loss")[-1]) for s in found.scores.values()]
    assert ends == pytest.approx([ends[0]] * 4, abs=1e-6)
    with pytest.raises(UsageError, match="drop 1 to 3, not 4"):
        drop_greedily(source, 4, progress=False)


def test_greedy_and_influence_find_the_dead_layers_first() -> None:
    net = planted.WiredNet([(0, 2, 6.0), None, (0, 2, 3.0), None]).eval()
    found = drop_greedily(net, 4, **PLANTED)
    for name in (GREEDY, INFLUENCE):
        assert set(found.orders[name][:2]) == {1, 3}
        assert found.orders[name][2] == 2
        assert found.scores[name].mean("delta_loss")[:2].tolist() == [0.0, 0.0]


def test_rank_correlation_by_hand() -> None:
    proxy, score = np.array([1.0, 2.0, 3.0, 4.0, np.nan]), np.array([1.0, 3.0, 2.0, 4.0, 9.0])
    # Spearman: 1 - 6 sum d^2 / (n (n^2 - 1)) with d = 0, 1, 1, 0 and n = 4.
    assert rank_correlation(proxy, score)[0] == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert np.isnan(rank_correlation(np.ones(4), np.arange(4.0))[0])
    assert np.isnan(rank_correlation(np.arange(2.0), np.arange(2.0))[0])


def test_proxies_by_plain_loops() -> None:
    source = live(case("bert"))
    found = ablate(source, progress=False, units="layers")
    (block,) = source.blocks()
    for index, drop in enumerate(found.drops):
        first, last = layer_span(source.stream, drop.layers[0])
        influence, sizes, angles = [], [], []
        for token in range(33):
            a, b = block.states[first][token].double(), block.states[last][token].double()
            write = sum(block.writes[s][token].double() for s in drop.sublayers)
            cosine = float(a @ b / (a.norm() * b.norm()))
            if token % 11:
                influence.append(1 - cosine)
                sizes.append(float(torch.as_tensor(write).norm() / a.norm()))
            if token % 11 == 10:
                angles.append(np.arccos(cosine) / np.pi)
        row = found.rows()[index]
        assert row["block_influence"] == pytest.approx(np.mean(influence))
        assert row["relative_write"] == pytest.approx(np.mean(sizes))
        assert row["angular_distance"] == pytest.approx(np.mean(angles))


# ---- effects --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("units", ["sublayers", "layers"])
@pytest.mark.parametrize(
    "name", ["gpt2", "llama", "gptj", "granite", "user_post_norm", "deepnorm", "scaled_skip_constant"]
)
def test_effects_add_up_to_the_change_of_the_logit(name: str, units: str) -> None:
    """T-D8: against the logits that the model itself gives with and without the write."""
    source = live(case(name))
    found = effects(source, units=units, progress=False)
    (block,) = source.blocks()
    targets = target_ids(source, block).reshape(block.shape)[:, 1:]
    runs = next(iter_runs(source))
    for index, unit in enumerate(every(source.stream, units, "zero")):
        with running():
            change = (runs.baseline() - runs.without(unit)).double()[:, 1:]
        picked = change.gather(-1, targets.clamp_min(0)[..., None])[..., 0][targets >= 0]
        means = {name: float(values[index]) for name, values in found.means.items()}
        assert means["total"] == pytest.approx(float(picked.mean()), abs=1e-5), unit
        assert means["direct"] + means["indirect"] + means["norm"] == pytest.approx(means["total"], abs=1e-5)
        assert means["indirect"] == pytest.approx(found.response[index].sum(), abs=1e-9)


def test_effects_of_a_soft_capped_model_are_of_the_logit_before_the_cap() -> None:
    found = case("gemma2")
    result = effects(live(found), progress=False)
    uncapped: Any = copy.deepcopy(found.module)
    assert uncapped.config.final_logit_softcapping
    uncapped.config.final_logit_softcapping = None
    plain = source_of(uncapped, inputs=found.inputs)
    (block,) = plain.blocks()
    targets = target_ids(plain, block).reshape(block.shape)[:, 1:]
    runs = next(iter_runs(plain))
    for index, unit in enumerate(every(plain.stream, "sublayers", "zero")):
        with running():
            change = (runs.baseline() - runs.without(unit)).double()[:, 1:]
        picked = change.gather(-1, targets.clamp_min(0)[..., None])[..., 0][targets >= 0]
        assert result.means["total"][index] == pytest.approx(float(picked.mean()), rel=1e-4, abs=1e-5)


def test_direct_effect_by_hand() -> None:
    """In GPT-2 the final norm's gain and scale stand between a write and the unembedding."""
    found = case("gpt2")
    source = live(found)
    result = effects(source, progress=False)
    (block,) = source.blocks()
    module: Any = found.module
    x, write = block.states[-1].double(), block.writes[3].double()
    sigma = (x.var(-1, correction=0) + module.transformer.ln_f.eps).sqrt()
    centred = (write - write.mean(-1, keepdim=True)) / sigma[:, None] * module.transformer.ln_f.weight.double()
    targets = target_ids(source, block)
    logits = (centred * module.lm_head.weight.double()[targets.clamp_min(0)]).sum(-1)
    counted = (targets >= 0) & (block.position > 0)
    assert result.means["direct"][3] == pytest.approx(float(logits[counted].mean()), rel=1e-5)


class Repair(nn.Module):
    """Gives the answer where it is missing: what layer 0 wrote and this one reads is given less of."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.up = nn.Linear(3 * planted.VOCAB, planted.VOCAB)
        self.down = nn.Linear(planted.VOCAB, 3 * planted.VOCAB, bias=False)
        with torch.no_grad():
            self.up.weight.zero_()
            self.up.weight[:, 2 * planted.VOCAB :] = -torch.eye(planted.VOCAB)
            self.up.bias.fill_(planted.STRENGTH)
            self.down.weight.zero_()
            self.down.weight[2 * planted.VOCAB :] = share * torch.eye(planted.VOCAB)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        written: torch.Tensor = self.down(torch.relu(self.up(x)))
        return x + written


def test_a_planted_repair_is_found_and_its_size_is_right() -> None:
    net = planted.dead_layer()
    net.layers[1] = Repair(0.7)
    row = effects(net, **PLANTED)
    assert row.means["direct"][0] == pytest.approx(6.0)
    assert row.means["indirect"][0] == pytest.approx(-0.7 * 6.0, rel=1e-6)
    assert row.response[0].tolist() == pytest.approx([0.0, -4.2], rel=1e-6)
    # Through zero over both units; what layer 0 gives directly is 6, in total 30 % of it, and layer 1 gives the rest.
    x, y = row.means["direct"], row.means["total"]
    assert y[0] == pytest.approx(0.3 * 6.0, rel=1e-6)
    assert row.slope == pytest.approx(np.linalg.lstsq(x[:, None], y, rcond=None)[0][0], rel=1e-9)
    assert row.slope < 1.0


def test_effects_merge_and_do_not_depend_on_the_source(tmp_path: Path) -> None:
    found = case("llama")
    ids: Any = found.inputs
    model = sl.load(found.module)
    options: dict[str, Any] = {"tokens": list(ids["input_ids"]), "window": 11, "batch_tokens": 11}
    with sl.capture(model, out=tmp_path / "x.h5", progress=False, **options):
        pass
    from_file = effects(tmp_path / "x.h5", model=model, progress=False)
    from_model = effects(model, progress=False, **options)
    for name, values in from_model.means.items():
        np.testing.assert_allclose(from_file.means[name], values, rtol=1e-9, atol=1e-12)
    source = source_of(tmp_path / "x.h5", model=model)
    units = every(source.stream, "sublayers", "zero")
    first, rest = Effects(source, units), Effects(source, units)
    for index, block in enumerate(source.blocks()):
        (rest if index else first).update(block)
    first.merge(rest)
    for name, values in from_file.means.items():
        np.testing.assert_allclose(first.result().means[name], values, rtol=1e-12)
    np.testing.assert_allclose(first.result().response, from_file.response, rtol=1e-12)


def test_effects_need_a_linear_way_to_logits() -> None:
    with pytest.raises(MissingDataError):
        effects(case("bert").module, inputs=case("bert").inputs, progress=False)
    with pytest.raises(MissingDataError):
        effects(case("encoder_pre").module, inputs=case("encoder_pre").inputs, progress=False)
    with pytest.raises(UsageError, match="units of effects"):
        effects(case("gpt2").module, units="heads", inputs=case("gpt2").inputs, progress=False)


# ---- figures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("study", [ablate, ablate_blocks, ablate_pairs, swap_neighbours, drop_greedily, effects])
@pytest.mark.parametrize("name", ["gpt2", "user_post_norm"])
def test_figures_have_labelled_axes_and_tables_come_in_all_formats(study: Any, name: str, tmp_path: Path) -> None:
    found = study(case(name).module, inputs=case(name).inputs, progress=False)
    ax = found.plot()
    assert ax.get_xlabel()[0].isupper()
    assert "\n" not in ax.get_xlabel()
    assert ax.get_ylabel()[0].isupper()
    for suffix in (".png", ".svg", ".csv", ".json"):
        assert found.save(tmp_path / f"x{suffix}").stat().st_size > 100
    assert len(found.to_frame()) == len(found.rows()) > 0
    assert all(not isinstance(value, (list, dict, Drop)) for row in found.rows() for value in row.values())
    assert "<svg" in found._repr_html_()
