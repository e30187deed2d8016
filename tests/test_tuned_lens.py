"""The tuned lens: closed forms against other solvers, gradients against autograd, and what it may not do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch import Tensor

import streamlens as sl
from fixtures import zoo
from streamlens.analyses.lens.descent import Descent, _divergence, descend
from streamlens.analyses.lens.door import logit_lens
from streamlens.analyses.lens.head import LinearHead, head_of
from streamlens.analyses.lens.moments import StateMoments
from streamlens.analyses.lens.trace import Chain
from streamlens.analyses.lens.tuned import TunedLens, _split, load_lens, train_lens
from streamlens.analyses.sampling import sampled
from streamlens.analyses.source import Source, source_of
from streamlens.block import Block
from streamlens.errors import FormatError, UsageError
from tests.conftest import minilm

MODEL = Path(__file__).resolve().parent.parent / "fixtures" / "model.pt"
TEXT = [f"Document {n} says that {n} and {n + 1} make {2 * n + 1}, which is an odd number. " * 3 for n in range(12)]


def source(name: str = "gpt2", docs: int = 6) -> Source:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, 97, (docs, 12), generator=generator)
    return source_of(zoo.build(name).module, tokens=ids, batch_tokens=24)


def trained_on(origin: Source) -> list[Block]:
    """The training tokens, found anew."""
    held = set(_split(origin, 0.2, 0).tolist())
    kept = []
    for block in origin.blocks():
        rows = torch.tensor([int(d) not in held for d in block.doc])
        ids, doc, position = block.ids[rows], block.doc[rows], block.position[rows]
        kept.append(Block(0, 0, ids, doc, position, (), [s[rows] for s in block.states], (), (), {}))
    return kept


def states_of(blocks: list[Block], k: int) -> Tensor:
    return torch.cat([b.states[k] for b in blocks]).double()


@pytest.mark.parametrize("name", ["gpt2", "user_post_norm", "gemma2", "gptj", "granite"])
def test_bias_is_the_mean_of_what_is_missing(name: str) -> None:
    origin = source(name)
    lens = train_lens(origin, kind="bias", progress=False)
    blocks = trained_on(origin)
    last = len(origin.stream.steps)
    assert lens.matrix is None
    for k in range(last):
        missing = (states_of(blocks, last) - states_of(blocks, k)).mean(0)
        torch.testing.assert_close(lens.bias[k].double(), missing, rtol=1e-5, atol=1e-6)
    state = origin.blocks().__iter__().__next__().states[last]
    assert lens.translate(last, state) is state


def test_ridge_equals_scikit_learn() -> None:
    origin = source(docs=12)
    lens = train_lens(origin, kind="ridge", ridge=0.3, progress=False)
    blocks = trained_on(origin)
    assert lens.matrix is not None
    for k in (0, 3, 5):
        x, y = states_of(blocks, k).numpy(), states_of(blocks, 6).numpy()
        penalty = 0.3 * float(torch.tensor(x.var(0)).median()) * len(x)
        oracle = Ridge(alpha=penalty).fit(x, y - x)
        np.testing.assert_allclose(lens.matrix[k], oracle.coef_, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(lens.bias[k], oracle.intercept_, rtol=1e-3, atol=1e-4)


def test_ridge_finds_a_map_that_is_there() -> None:
    """x_0 a linear image of x_1: without a penalty the translated state is x_1."""
    generator = torch.Generator().manual_seed(0)
    last = torch.randn(400, 6, generator=generator) + 3
    first = (last - 1.0) @ torch.randn(6, 6, generator=generator)
    sums, other = (StateMoments(1, 6, second=True) for _ in range(2))
    for target, rows in ((sums, slice(0, 150)), (other, slice(150, 400))):
        part = [first[rows], last[rows]]
        none = torch.zeros(len(part[0]), dtype=torch.int64)
        target.update(Block(0, 0, none, none, none, (), part, (), (), {}))
    sums.merge(other)
    matrix, bias = sums.ridge(0.0)
    torch.testing.assert_close(first + first @ matrix[0].t() + bias[0], last, rtol=1e-3, atol=1e-3)


def lens_like(lens: TunedLens, **changes: Any) -> TunedLens:
    return TunedLens(**{**vars(lens), **changes})


def test_before_any_training_it_is_the_logit_lens() -> None:
    origin = source()
    lens = train_lens(origin, kind="bias", progress=False)
    nothing = lens_like(lens, matrix=torch.zeros(6, 32, 32), bias=torch.zeros(6, 32))
    plain, tuned = logit_lens(origin, progress=False), logit_lens(origin, translators=nothing, progress=False)
    for name, summary in plain.metrics.items():
        np.testing.assert_array_equal(tuned.metrics[name].mean, summary.mean)
    assert tuned.title.startswith("tuned lens (bias)")


def test_gradient_of_the_divergence_is_autograds() -> None:
    generator = torch.Generator().manual_seed(2)
    head = LinearHead(
        Chain.of(lambda x: torch.nn.functional.layer_norm(x, (8,))), torch.randn(40, 8, generator=generator), ()
    )
    state, final = torch.randn(2, 9, 8, generator=generator), torch.randn(9, 40, generator=generator).log_softmax(-1)
    weight = (0.1 * torch.randn(8, 8, generator=generator)).requires_grad_()
    bias = torch.zeros(8, requires_grad=True)
    value = _divergence(head, final, state[0], weight, bias, backward=True)
    own = weight.detach().clone().requires_grad_()
    logits = head.logits(state[0] + state[0] @ own.t())
    loss = torch.nn.functional.kl_div(logits.log_softmax(-1), final, log_target=True, reduction="batchmean")
    loss.backward()  # type: ignore[no-untyped-call]
    assert value == pytest.approx(float(loss.detach()), rel=1e-5)
    torch.testing.assert_close(weight.grad, own.grad, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def origin() -> Source:
    return source_of(sl.load(MODEL), text=TEXT, window=64)


@pytest.fixture(scope="module")
def lens() -> TunedLens:
    return train_lens(source(), kind="ridge", progress=False)


class TestDescent:
    def divergences(self, origin: Source, lens: TunedLens | None) -> Tensor:
        """(state,) mean KL over the training tokens, by autograd-free plain code."""
        blocks, head = trained_on(origin), head_of(origin, next(iter(origin.blocks())))
        last = len(origin.stream.steps)
        final = head.logits(states_of(blocks, last).float()).log_softmax(-1)
        found = []
        for k in range(last):
            state = states_of(blocks, k).float()
            out = head.logits(state if lens is None else lens.translate(k, state)).log_softmax(-1)
            found.append((final.exp() * (final - out)).sum(-1).mean())
        return torch.stack(found)

    def test_lower_at_every_state_and_better_held_out(self, origin: Source) -> None:
        lens = train_lens(origin, kind="kl", start="zero", steps=60, step_tokens=128, progress=False)
        before, after = self.divergences(origin, None), self.divergences(origin, lens)
        assert bool((after < before).all())
        assert (lens.kl[:-1, 0] < lens.kl_logit_lens[:-1, 0]).all()
        assert lens.kl[-1, 0] == lens.kl_logit_lens[-1, 0] == 0
        assert [r["label"] for r in lens.rows()][:2] == ["x_0", "0_attn_out"]

    def test_from_the_ridge_map(self, origin: Source) -> None:
        ridge = train_lens(origin, kind="ridge", progress=False)
        lens = train_lens(origin, kind="kl", steps=20, step_tokens=128, progress=False)
        assert bool((self.divergences(origin, lens) < self.divergences(origin, ridge)).all())

    def test_a_state_that_gets_worse_keeps_what_it_had(self, origin: Source) -> None:
        head = head_of(origin, next(iter(origin.blocks())))
        assert isinstance(head, LinearHead)
        blocks = trained_on(origin)
        settings = Descent(steps=3, step_tokens=64, learning_rate=50.0, dtype=None, seed=0)
        count = len(origin.stream.steps)
        begun = torch.zeros(count, origin.stream.d_model)

        def again() -> Iterator[Block]:
            return iter(blocks)

        (matrix, bias), used = descend(head, again, None, begun, settings)
        assert used == 3 * 64
        kept = ~matrix.flatten(1).any(1) & ~bias.any(1)
        assert bool(kept.any()), "steps this large ruin most states"
        assert not bool(kept.all()), "and x_0, which is far off, gains even so"

    def test_products_in_bfloat16(self, origin: Source) -> None:
        lens = train_lens(origin, kind="kl", start="bias", steps=20, dtype="bfloat16", progress=False)
        assert (lens.kl[:-1, 0] < lens.kl_logit_lens[:-1, 0]).all()


def test_on_its_own_text_it_says_so(tmp_path: Path) -> None:
    """The same tokens live, from a capture, and windows of them are known again; other tokens are not."""
    model, given = sl.load(MODEL), {"text": TEXT, "window": 64}
    lens = train_lens(model, kind="bias", progress=False, **given)  # type: ignore[arg-type]
    assert set(lens.held_out) == set(_split(source_of(model, **given), 0.2, 0).tolist())  # type: ignore[arg-type]
    filed = load_lens(lens.save(tmp_path / "lens.pt"))
    with sl.capture(model, out=tmp_path / "own.h5", progress=False, **given) as capture:  # type: ignore[arg-type]
        captured = source_of(capture, model=model)
        for own in (captured, source_of(model, **given), sampled(captured, 3)):  # type: ignore[arg-type]
            found = logit_lens(own, translators=filed, progress=False)
            assert found.on_training_text
            assert found.title.startswith("tuned lens (bias), on the text that it was trained on: ")
            assert all(row["on_training_text"] for row in found.rows())
        assert not logit_lens(captured, progress=False).on_training_text
    other = logit_lens(model, translators=filed, text=TEXT[1:], window=64, progress=False)
    assert not other.on_training_text
    assert "trained" not in other.title


def test_a_lens_of_an_older_file_does_not_know_its_text(tmp_path: Path, lens: TunedLens) -> None:
    path = lens.save(tmp_path / "lens.pt")
    content = torch.load(path, weights_only=True)
    del content["text_sha256"], content["held_out"]
    torch.save(content, path)
    assert not logit_lens(source(), translators=path, progress=False).on_training_text


def test_held_out_documents_teach_nothing() -> None:
    """Other tokens in the documents held out change the score and not the lens."""
    module = zoo.build("gpt2").module
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, 97, (6, 12), generator=generator)
    first = train_lens(module, tokens=ids, kind="ridge", progress=False)
    held = _split(source_of(module, tokens=ids), 0.2, 0)
    assert len(held) == 1
    changed = ids.clone()
    changed[held] = (changed[held] + 11) % 97
    second = train_lens(module, tokens=changed, kind="ridge", progress=False)
    assert first.matrix is not None
    assert second.matrix is not None
    torch.testing.assert_close(first.matrix, second.matrix, rtol=1e-4, atol=1e-5)
    assert not np.allclose(first.kl_logit_lens, second.kl_logit_lens)
    changed = ids.clone()
    changed[(int(held[0]) + 1) % 6] = (changed[(int(held[0]) + 1) % 6] + 11) % 97
    third = train_lens(module, tokens=changed, kind="ridge", progress=False)
    assert third.matrix is not None
    assert float((first.matrix - third.matrix).abs().max()) > 1e-2


class TestFiles:
    def test_saved_and_read_again(self, lens: TunedLens, tmp_path: Path) -> None:
        again = load_lens(lens.save(tmp_path / "lens.pt"))
        for name, value in vars(lens).items():
            other = getattr(again, name)
            if isinstance(value, Tensor):
                assert torch.equal(value, other)
            else:
                np.testing.assert_equal(value, other)
        live = logit_lens(source(), translators=lens, progress=False)
        filed = logit_lens(source(), translators=tmp_path / "lens.pt", progress=False)
        np.testing.assert_array_equal(live.kl.mean, filed.kl.mean)

    def test_another_model_refuses_it(self, lens: TunedLens) -> None:
        with pytest.raises(UsageError, match="belongs to the model with sha256"):
            logit_lens(source("nanogpt"), translators=lens, progress=False)

    def test_another_stream_refuses_it(self, lens: TunedLens) -> None:
        with pytest.raises(UsageError, match="belongs to the stream 'encoder'"):
            logit_lens(source(), translators=lens_like(lens, stream="encoder"), progress=False)

    def test_what_is_not_a_lens(self, lens: TunedLens, tmp_path: Path) -> None:
        torch.save({"a": 1}, tmp_path / "other.pt")
        (tmp_path / "text.pt").write_text("hello")
        torch.save({**vars(lens), "format": "streamlens tuned lens 9"}, tmp_path / "newer.pt")
        for name in ("other.pt", "text.pt", "newer.pt"):
            with pytest.raises(FormatError, match="tuned lens"):
                load_lens(tmp_path / name)

    def test_nothing_in_it_runs(self, tmp_path: Path) -> None:
        class Evil:
            def __reduce__(self) -> tuple[Any, ...]:
                return (Path.touch, (tmp_path / "sentinel",))

        torch.save({"format": Evil()}, tmp_path / "evil.pt")
        with pytest.raises(FormatError):
            load_lens(tmp_path / "evil.pt")
        assert not (tmp_path / "sentinel").exists()

    def test_table_and_figure(self, lens: TunedLens, tmp_path: Path) -> None:
        lens.save(tmp_path / "a.png")
        lens.save(tmp_path / "a.csv")
        assert set(lens.rows()[0]) >= {"state", "label", "kl_logit_lens", "kl", "kl_low", "kl_high"}


@pytest.mark.parametrize(
    ("options", "message"),
    [({"kind": "cubic"}, "one kind of bias, ridge, kl"), ({"held_out": 1.5}, "between 0 and 1")],
)
def test_mistakes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        train_lens(source(), progress=False, **options)


def test_one_document_cannot_be_split() -> None:
    with pytest.raises(UsageError, match="one document only: give several"):
        train_lens(source(docs=1), progress=False)


@pytest.mark.real
def test_minilm_by_the_ridge_map() -> None:
    """Post-norm: the least-squares map brings early states nearer to the last one on documents not seen."""
    lens = train_lens(minilm(), kind="ridge", ridge=1.0, window=64, max_tokens=4096, progress=False)
    assert (lens.kl[:6, 0] < lens.kl_logit_lens[:6, 0]).all()
