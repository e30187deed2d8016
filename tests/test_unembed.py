"""The head taken apart, against the model's own head at every state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import streamlens as sl
from fixtures import zoo
from streamlens.analyses.lens.head import NEAREST, OWN, Head, LinearHead, WholeHead, head_of, tolerance
from streamlens.analyses.source import Source, source_of
from streamlens.analyses.unembedding import Unembedding
from streamlens.block import Block
from streamlens.calling import eager_math
from streamlens.edits import run_from
from streamlens.errors import MissingDataError
from streamlens.observation import tokens
from tests.conftest import Case, case, taken

WITHOUT_HEAD = {
    "bert_model", "vit", "user_post_norm_embeddings", "encoder_pre", "encoder_post", "transformer_pre",
    "transformer_post",
}  # fmt: skip
WITH_HEAD = [name for name in zoo.names() if name not in WITHOUT_HEAD]


def opened(found: Case) -> tuple[Source, Block, Head]:
    source = source_of(found.module, inputs=found.inputs)
    block = next(source.blocks())
    return source, block, head_of(source, block)


def own_logits(found: Case, source: Source, block: Block, k: int) -> Tensor:
    """(token, vocab) by the model itself."""
    docs, positions = block.shape
    state = block.states[k].reshape(docs, positions, -1)
    with torch.no_grad():
        out = run_from(found.module, found.anatomy, len(source.stream.steps), state, found.inputs)
    return tokens(out, source.stream, docs, positions).flatten(0, 1)


@pytest.mark.parametrize("name", WITH_HEAD)
def test_every_head_is_taken_apart_and_equals_the_models_own(name: str) -> None:
    found = case(name)
    source, block, head = opened(found)
    assert isinstance(head, LinearHead)
    assert head.description == OWN
    for k in range(len(block.states)):
        truth = own_logits(found, source, block, k)
        with torch.no_grad():
            logits = head.logits(block.states[k])
            out = torch.empty_like(logits)
            head.product(head.hidden(block.states[k]), out)
            head.finish(out)
        bound = tolerance(torch.float32) * float(truth.abs().max())
        torch.testing.assert_close(logits, truth, rtol=0, atol=bound)
        torch.testing.assert_close(out, logits, rtol=0, atol=bound)


@pytest.mark.parametrize("name", ["llama", "gemma2", "bert", "bart"])
def test_in_half_precision(name: str) -> None:
    found = case(name, torch.bfloat16)
    source, block, head = opened(found)
    truth = own_logits(found, source, block, 1)
    with torch.no_grad():
        torch.testing.assert_close(
            head.logits(block.states[1]), truth, rtol=0, atol=tolerance(torch.bfloat16) * float(truth.abs().max())
        )


class _Odd(nn.Module):
    """A pre-norm model whose head is given."""

    def __init__(self, head: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm = nn.Embedding(23, 8), nn.LayerNorm(8)
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in "12"
        )
        self.unembed = nn.Parameter(torch.randn(8, 23))
        self.head = head

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for mlp in self.mlps:
            x = x + mlp(x)
        return self.head(self.norm(x), self.unembed)


ODD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "summed over positions": lambda h, u: h.cumsum(1) @ u,
    "summed over positions afterwards": lambda h, u: (h @ u).cumsum(1),
    "a matrix for each document": lambda h, u: torch.bmm(h, torch.stack([u, 2 * u])[: len(h)]),
    "an einsum over reversed tokens": lambda h, u: torch.einsum("btd,dv->btv", h.flip(1), u).flip(1),
    "softmaxed": lambda h, u: (h @ u).log_softmax(-1),
    "a triangle of positions": lambda h, u: torch.tril(h) @ u,
    "positions in another order": lambda h, u: (h @ u)[:, torch.arange(h.shape[1]).flip(0)],
    "a factor for each position": lambda h, u: (h @ u) * torch.arange(1, h.shape[1] + 1)[None, :, None],
}


@pytest.mark.parametrize("name", list(ODD))
def test_odd_heads_are_right_whether_taken_apart_or_not(name: str) -> None:
    model = _Odd(ODD[name]).eval()
    ids = torch.arange(22).reshape(2, 11)
    source = source_of(model, inputs=ids)
    block = next(source.blocks())
    head = head_of(source, block)
    alike = name in ("an einsum over reversed tokens", "softmaxed")
    assert alike or isinstance(head, WholeHead), "tokens are not treated alike"
    head.begin(block)
    with torch.no_grad(), eager_math():
        truth = model(ids).flatten(0, 1)
        torch.testing.assert_close(head.logits(block.states[-1]), truth, rtol=1e-5, atol=1e-5)


def test_padding_tokens_behind_minus_infinity() -> None:
    def hidden(h: Tensor, u: Tensor) -> Tensor:
        return (h @ u).masked_fill(torch.arange(23) > 19, -torch.inf)

    source = source_of(_Odd(hidden).eval(), inputs=torch.arange(22).reshape(2, 11))
    block = next(source.blocks())
    head = head_of(source, block)
    if isinstance(head, WholeHead):
        head.begin(block)
    out = torch.empty(22, 23)
    with torch.no_grad():
        head.product(head.hidden(block.states[-1]), out)
        head.finish(out)
    assert bool(out.isfinite().all())
    assert float(out[:, 20:].max()) <= -1e4


def test_without_a_head_the_word_embeddings_and_it_says_so() -> None:
    found = case("bert_model")
    _, block, head = opened(found)
    assert head.description == NEAREST
    module: Any = found.module
    truth = block.states[2] @ module.embeddings.word_embeddings.weight.t()
    torch.testing.assert_close(head.logits(block.states[2]), truth)


def test_the_encoder_of_an_encoder_decoder_has_no_head() -> None:
    found = case("t5")
    source = source_of(found.module, inputs=found.inputs, stream="encoder")
    block = next(source.blocks())
    head = head_of(source, block)
    module: Any = found.module
    assert head.description == NEAREST
    truth = module.encoder.final_layer_norm(block.states[1]) @ module.shared.weight.t()
    torch.testing.assert_close(head.logits(block.states[1]), truth)


@pytest.mark.parametrize("name", ["vit", "encoder_pre"])
def test_with_neither_it_says_what_would_work(name: str) -> None:
    with pytest.raises(MissingDataError, match="Load the model with its language-model head"):
        opened(case(name))


def test_a_capture_of_some_positions_is_enough_to_find_the_head(tmp_path: Any) -> None:
    found = case("gpt2")
    with taken(found, tmp_path / "a.h5", positions=[0, 3, 4]) as capture:
        from streamlens.checkpoint.loading import load

        source = source_of(capture, model=load(found.module))
        assert head_of(source, next(source.blocks())).description == OWN


# ---- the way to the logits as an affine map -------------------------------------------------------------------------

HIDDEN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "filled": lambda h, u: (h @ u).masked_fill(torch.arange(u.shape[1]) > 19, -torch.inf),
    "added": lambda h, u: h @ u + torch.where(torch.arange(u.shape[1]) > 19, -torch.inf, 0.5),
}


@pytest.mark.parametrize("name", list(HIDDEN))
def test_hidden_entries_do_not_count_in_attributions(name: str) -> None:
    """Against the logits that can be seen, and their mean over the entries that can be seen."""
    model = _Odd(HIDDEN[name]).eval()
    source = source_of(model, inputs=torch.arange(22).reshape(2, 11) % 20)
    block = next(source.blocks())
    targets = torch.arange(22) * 3 % 20
    unembedding = Unembedding(source)
    with torch.no_grad():
        logits = model(torch.arange(22).reshape(2, 11) % 20).flatten(0, 1)[:, :20]
    own = logits.gather(-1, targets[:, None])[:, 0]
    for centred, truth in ((False, own), (True, own - logits.mean(-1))):
        along = unembedding.directions(block, targets, centred=centred)
        found = (along * block.states[-1]).sum(-1) + unembedding.constant(block, targets, centred=centred)
        shift = 0.5 if name == "added" and not centred else 0.0  # behind what is not affine, so left out as a cap is
        torch.testing.assert_close(found + shift, truth, rtol=1e-5, atol=1e-5)
    found_effects = sl.effects(source, progress=False).means
    parts = found_effects["direct"] + found_effects["indirect"] + found_effects["norm"]
    assert parts == pytest.approx(found_effects["total"], abs=1e-5)
    result = sl.contribution_norms(source, logits=True, progress=False)
    assert bool(torch.as_tensor(result.column("logit_attribution"))[: len(block.parts)].isfinite().all())


def test_a_hidden_layer_in_the_head_is_refused() -> None:
    model = _Odd(lambda h, u: torch.relu(h) @ u).eval()
    with pytest.raises(MissingDataError, match="not linear behind its norm"):
        Unembedding(source_of(model, inputs=torch.arange(22).reshape(2, 11)))


class _Largest(TorchDispatchMode):
    """Notes the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(made, Tensor):
                self.largest = max(self.largest, made.numel())
        return result


def test_attribution_makes_no_tensor_of_tokens_times_vocabulary() -> None:
    model = _Odd(lambda h, u: h @ u).eval()
    model.unembed = nn.Parameter(torch.randn(8, 9000))
    source = source_of(model, inputs=torch.arange(1024).reshape(4, 256) % 23)
    block = next(source.blocks())
    targets = torch.arange(1024) % 9000
    unembedding = Unembedding(source)
    with _Largest() as seen:
        unembedding.directions(block, targets)
        unembedding.constant(block, targets)
        unembedding.target_logit(block.states[-1], targets)
    assert seen.largest <= 9000 * 8
    with torch.no_grad():
        logits = model(torch.arange(1024).reshape(4, 256) % 23).flatten(0, 1)
    along = unembedding.directions(block, targets)
    found = (along * block.states[-1]).sum(-1) + unembedding.constant(block, targets)
    truth = logits.gather(-1, targets[:, None])[:, 0] - logits.mean(-1)
    torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-4)
