"""Laws of pairs and effects (METHODS.md, T-D7, T-D8), nets with known answers, and what training leaves to drop."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import streamlens as sl
from fixtures import planted, witnesses
from streamlens.analyses.ablation.runs import Runs, Setting, running
from streamlens.analyses.ablation.spans import every, together
from streamlens.analyses.source import Source, source_of, target_ids
from streamlens.calling import invoke
from streamlens.corpus.documents import builtin_documents
from streamlens.errors import AnatomyError
from tests.conftest import case

PLANTED: dict[str, Any] = {"tokens": list(planted.documents()), "window": planted.POSITIONS}


def runs_of(source: Source) -> Runs:
    block = next(iter(source.blocks()))
    return Runs(Setting.of(source), block, source.inputs(block))


# ---- T-D7: interactions ----------------------------------------------------------------------------------------------


class Constant(nn.Module):
    """A layer that writes the same whatever it reads."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.up = nn.Linear(3 * planted.VOCAB, 4)
        self.down = nn.Linear(4, 3 * planted.VOCAB)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.up.weight.zero_()
            self.down.bias.copy_(torch.randn(3 * planted.VOCAB, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))  # type: ignore[no-any-return]


def test_constant_writes_do_not_interact_in_a_linear_score() -> None:
    """T-D7 in float64: the logits are linear in what is written, so what two give together is what each gives alone."""
    net = planted.dead_layer()
    net.layers = nn.ModuleList([Constant(seed) for seed in range(3)])
    source = source_of(net.double().eval(), **PLANTED)
    runs, layers = runs_of(source), every(source.stream, "layers")
    with running():
        full = runs.baseline()
        lost = [full - runs.without(layer) for layer in layers]
        for i in range(3):
            assert float(lost[i].abs().max()) > 0.1
            for j in range(i):
                both = full - runs.without(together([layers[j], layers[i]]))
                assert float((both - lost[i] - lost[j]).abs().max()) < 1e-9


class Rms(nn.Module):
    """A planted layer that reads the stream through a norm: what it writes does not grow with the stream."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(3 * planted.VOCAB, eps=1e-6)
        self.up, self.down = inner.up, inner.down

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))  # type: ignore[no-any-return]


def with_norms(net: planted.WiredNet) -> nn.Module:
    net.layers = nn.ModuleList([Rms(layer) for layer in net.layers])
    return net.eval()


def test_backups_interact_positively_and_a_series_negatively_behind_norms_too() -> None:
    """T-D7: the signs do not hang on layers that read the raw stream."""
    backup = sl.ablate_pairs(with_norms(planted.backup_pair()), **PLANTED, progress=False)
    serial = sl.ablate_pairs(with_norms(planted.serial_pair()), **PLANTED, progress=False)
    assert backup.interaction[0, 2] > 1.0
    assert serial.interaction[0, 2] < -1.0
    for found in (backup, serial):
        assert abs(found.interaction[0, 1]) < 1e-6
        assert abs(found.interaction[1, 2]) < 1e-6


def test_blocks_of_planted_nets() -> None:
    """A block without the dead layer costs what its one live layer costs; both of a pair cost more than either."""
    found = sl.ablate_blocks(planted.backup_pair(), **PLANTED, progress=False)
    single, double = found.grid[0], found.grid[1]
    assert single[1] == 0.0
    assert double[:2] == pytest.approx([single[0], single[2]], abs=1e-6)
    pair = sl.ablate(planted.backup_pair(), [0, 2], **PLANTED, progress=False)
    assert pair.rows()[0]["delta_loss"] > 50 * single[0]


def test_effects_in_planted_nets() -> None:
    """Of a backup nothing is indirect. In a series the first writes nothing that the head reads: all is indirect."""
    backup = sl.effects(planted.backup_pair(), units="layers", **PLANTED, progress=False).means
    for layer in (0, 2):
        assert backup["direct"][layer] == pytest.approx(planted.STRENGTH, rel=1e-6)
        assert backup["indirect"][layer] == pytest.approx(0.0, abs=1e-9)
    serial = sl.effects(planted.serial_pair(), units="layers", **PLANTED, progress=False).means
    assert serial["direct"][0] == pytest.approx(0.0, abs=1e-9)
    assert serial["indirect"][0] == pytest.approx(planted.STRENGTH, rel=1e-6)
    assert serial["total"] == pytest.approx([planted.STRENGTH, 0.0, planted.STRENGTH], abs=1e-6)


# ---- T-D8: effects ---------------------------------------------------------------------------------------------------


def silent(found: Any, labels: list[str]) -> Tensor:
    """Run a whole model, from its first operation on, with some of its writes set to zero."""
    stream = found.anatomy.stream()
    gone: dict[int, Callable[[Tensor], Tensor]] = {stream.find(label).index: torch.zeros_like for label in labels}
    with running(), sl.edit(found.module, found.anatomy, writes=gone):
        return invoke(found.module, found.inputs)


@pytest.mark.parametrize("units", ["sublayers", "layers"])
@pytest.mark.parametrize("name", ["t5", "bart", "cohere", "opt", "gemma2", "mamba"])
def test_effects_add_up_to_the_change_of_the_logit(name: str, units: str) -> None:
    """T-D8, for every unit of more families; in Gemma, the logit before it is capped."""
    found = case(name)
    source = source_of(found.module, inputs=found.inputs)
    (block,) = source.blocks()
    targets = target_ids(source, block).reshape(block.shape)[:, 1:]
    result = sl.effects(source, units=units, progress=False)
    cap = getattr(getattr(found.module, "config", None), "final_logit_softcapping", None)

    def opened(logits: Tensor) -> Tensor:
        wide = logits.double()
        return wide if cap is None else cap * torch.atanh(wide / cap)

    full = opened(silent(found, []))
    size = float(full.abs().max())
    for index, unit in enumerate(every(source.stream, units, "zero")):
        lost = full - opened(silent(found, [source.stream.labels[s] for s in unit.sublayers]))
        picked = lost[:, 1:].gather(-1, targets.clamp_min(0)[..., None])[..., 0][targets >= 0]
        means = {effect: float(values[index]) for effect, values in result.means.items()}
        together_ = means["direct"] + means["indirect"] + means["norm"]
        assert means["total"] == pytest.approx(float(picked.mean()), abs=2e-5 * max(1.0, size)), unit.label
        assert together_ == pytest.approx(float(picked.mean()), abs=2e-5 * max(1.0, size)), unit.label


# ---- trained witnesses -----------------------------------------------------------------------------------------------


@cache
def loss_without_a_layer(name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the increase of the loss by each layer of a witness, in nats a byte."""
    text = " ".join(builtin_documents())[:4096]
    model = witnesses.model(name)
    found = sl.ablate(model, units="layers", text=text, window=64, max_tokens=2048, progress=False)
    return found.scores.mean("delta_loss")


def test_a_model_that_was_trained_with_layers_missing_misses_them_less() -> None:
    """Fan et al. (1909.11556): the two models are equal but for that, and see the same text."""
    plain, dropped = loss_without_a_layer("pre_norm"), loss_without_a_layer("layer_drop")
    assert len(plain) == len(dropped)
    assert (plain > 0).all()
    assert dropped[1:].mean() < 0.7 * plain[1:].mean()


def test_a_model_without_skips_has_nothing_to_drop_from() -> None:
    with pytest.raises(AnatomyError):
        sl.ablate(witnesses.model("no_skip"), units="layers", text="abc" * 100, window=32, progress=False)
