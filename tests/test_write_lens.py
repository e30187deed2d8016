"""The write lens: parts that add up to the model's own logits, and what it is not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import streamlens as sl
from streamlens.analyses.lens.writes import WriteLensResult, write_lens
from streamlens.analyses.transport import Summand, transported
from streamlens.calling import invoke
from streamlens.errors import MissingDataError, UsageError
from streamlens.observation import observe, tokens
from tests.conftest import Case, case, taken

NAMES = [
    "gpt2", "llama", "gemma2", "gptj", "granite", "cohere", "opt", "t5", "bart", "user_post_norm", "deepnorm",
    "scaled_skip_parameter", "raw_parameters", "mamba",
]  # fmt: skip


def look(found: Case, **options: Any) -> WriteLensResult:
    return write_lens(found.module, inputs=found.inputs, **options)


@pytest.mark.parametrize("name", NAMES)
def test_parts_add_up_to_the_centred_logit_of_the_target(name: str) -> None:
    """Against the model's own output, which the analysis never looks at."""
    found = case(name)
    result = look(found, positions=range(6))
    assert result.error < 2e-6
    with torch.no_grad():
        out = invoke(found.module, found.inputs)
    positions = out.numel() // out.shape[-1] // found.docs
    logits = tokens(out, found.anatomy.stream(), found.docs, positions)[0].double()
    if result.capped:
        module: Any = found.module
        cap = module.config.final_logit_softcapping
        logits = cap * torch.atanh(logits / cap)
    centred = (logits - logits.mean(-1, keepdim=True))[:6]
    for j, target in enumerate(result.targets):
        if target >= 0:
            whole = result.target_logit[:, j].sum()
            assert whole == pytest.approx(float(centred[j, target]), abs=2e-4), name


def test_one_write_by_hand() -> None:
    """Llama: U A_f w with the norm's scale taken from the last state."""
    found = case("llama")
    result = look(found, doc=1, positions=[4])
    module: Any = found.module
    with torch.no_grad(), observe(module, found.anatomy) as seen:
        invoke(module, found.inputs)
    last, write = seen.states["main"][6][1, 4].double(), seen.writes["main"][3][1, 4].double()
    scale = (last.square().mean() + module.config.rms_norm_eps).rsqrt()
    added = module.lm_head.weight.double() @ (module.model.norm.weight.double() * write * scale)
    added = added - added.mean()
    row = result.labels.index("1_mlp_out")
    assert result.promoted[row, 0] == int(added.argmax())
    assert result.suppressed[row, 0] == int(added.argmin())
    assert result.promoted_logit[row, 0] == pytest.approx(float(added.max()), rel=1e-5)
    assert result.target_logit[row, 0] == pytest.approx(float(added[int(result.targets[0])]), abs=1e-5)
    assert result.spread[row, 0] == pytest.approx(float(added.std(correction=0)), rel=1e-5)


def test_a_file_gives_the_same(tmp_path: Path) -> None:
    found = case("user_post_norm")
    live = look(found, positions=[2, 5])
    with taken(found, tmp_path / "a.h5") as capture:
        filed = write_lens(capture, model=sl.load(found.module), positions=[2, 5])
    np.testing.assert_allclose(filed.target_logit, live.target_logit, atol=1e-5)
    assert filed.labels == live.labels


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_a_head_with_an_activation_has_no_shares(name: str) -> None:
    with pytest.raises(MissingDataError, match="not linear"):
        look(case(name))


def test_a_document_that_is_not_there() -> None:
    with pytest.raises(UsageError, match="there is no document 9: there are documents 0 to 2"):
        look(case("gpt2"), doc=9)


def test_rows_and_figure(tmp_path: Path) -> None:
    result = look(case("gpt2"), positions=range(5))
    assert len(result.rows()) == len(result.labels) * 5
    assert result.short_rows()[0]["label"] == "embed"
    result.save(tmp_path / "a.png")


class _Projected(nn.Module):
    """A stream 12 wide whose final norm is followed by a projection to 8, as in OPT-350m."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.mlp, self.norm = nn.Embedding(19, 12), nn.Linear(12, 12), nn.LayerNorm(12)
        self.project, self.unembed = nn.Linear(12, 8), nn.Linear(8, 19)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.mlp(x)
        out: Tensor = self.unembed(self.project(self.norm(x)))
        return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_projection_behind_the_norm_in_every_precision(dtype: torch.dtype) -> None:
    module, ids = _Projected().to(dtype), torch.arange(12)[None]
    result = write_lens(module, inputs=ids, positions=range(6))
    with torch.no_grad():
        logits = module(ids)[0, :6].double()
    centred = logits - logits.mean(-1, keepdim=True)
    whole = [float(centred[j, int(t)]) for j, t in enumerate(result.targets)]
    close = 4 * torch.finfo(dtype).eps * float(logits.abs().max()) if dtype.itemsize == 2 else 1e-5
    np.testing.assert_allclose(result.target_logit.sum(0), whole, atol=close)


def test_the_users_random_numbers_are_left_alone() -> None:
    before = torch.get_rng_state()
    look(case("llama"))
    assert torch.equal(torch.get_rng_state(), before)


def test_parts_that_do_not_add_up_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that is forgotten: no table with wrong shares."""

    def forgetful(*args: Any, **options: Any) -> Iterator[list[Summand]]:
        for summands in transported(*args, **options):
            yield [s for s in summands if s.label != "1_mlp_out"]

    monkeypatch.setattr("streamlens.analyses.lens.writes.transported", forgetful)
    with pytest.raises(MissingDataError, match="add up to other logits"):
        look(case("llama"))
