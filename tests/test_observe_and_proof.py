"""The central claim, on every shape of transformer: what is seen adds up, bit for bit, and looking changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fixtures import zoo
from streamlens.anatomy import Stream
from streamlens.calling import eager_math, invoke
from streamlens.edits import edit, run_from
from streamlens.errors import AnatomyError, MissingDataError
from streamlens.observation import Observation, observe, tokens
from streamlens.proof import Verdict, bound, same_bits
from streamlens.recorder.pilot import fly, parameters_of
from streamlens.replay import replay_states
from tests.conftest import Case, case

# The model itself cannot run its grouped expert product at this width in bfloat16.
NOT_IN_BFLOAT16 = {"qwen3_moe"}
DTYPES = [(name, dtype) for name in zoo.names() for dtype in (torch.float32, torch.bfloat16)]
CASES = [
    pytest.param(name, dtype, id=f"{name}-{str(dtype)[6:]}")
    for name, dtype in DTYPES
    if not (name in NOT_IN_BFLOAT16 and dtype == torch.bfloat16)
]


def watched(found: Case) -> tuple[Observation, Tensor, Tensor]:
    with torch.no_grad(), eager_math():
        plain = invoke(found.module, found.inputs)
        with observe(found.module, found.anatomy) as seen:
            output = invoke(found.module, found.inputs)
    return seen, plain, output


def laid_out(found: Case, stream: Stream, tensor: Tensor, like: Tensor) -> Tensor:
    positions = like.numel() // (found.docs * stream.d_model)
    return tokens(tensor, stream, found.docs, positions)


@pytest.mark.parametrize(("name", "dtype"), CASES)
class TestEveryShape:
    def test_states_replay_bit_for_bit(self, name: str, dtype: torch.dtype) -> None:
        """Flattened to tokens, as a file holds them: another layout than the model's."""
        found = case(name, dtype)
        seen, _, _ = watched(found)
        for stream in found.anatomy.streams:
            like = seen.states[stream.name][0]

            def rows(kept: dict[int, Tensor], stream: Stream = stream, like: Tensor = like) -> list[Tensor]:
                return [laid_out(found, stream, kept[i], like).flatten(0, 1) for i in range(len(kept))]

            states = rows(seen.states[stream.name])
            replayed = replay_states(
                stream, rows(seen.parts[stream.name]), rows(seen.writes[stream.name]), parameters_of(found.module)
            )
            assert len(states) == len(replayed) == len(stream.steps) + 1
            for ours, theirs in zip(replayed, states, strict=True):
                assert same_bits(ours, theirs)

    def test_looking_changes_nothing_and_leaves_nothing(self, name: str, dtype: torch.dtype) -> None:
        found = case(name, dtype)
        _, plain, output = watched(found)
        assert same_bits(plain, output)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in found.module.modules())

    def test_a_run_from_any_state_is_the_rest_of_the_run(self, name: str, dtype: torch.dtype) -> None:
        """From the last state this is the law that the head applied to x_S gives the model's logits."""
        found = case(name, dtype)
        seen, plain, _ = watched(found)
        with torch.no_grad(), eager_math():
            for stream in found.anatomy.streams:
                states = seen.states[stream.name]
                for k in range(len(stream.states)):
                    state = laid_out(found, stream, states[k], states[0])
                    before = state.clone()
                    args = (found.module, found.anatomy, k)
                    assert same_bits(run_from(*args, state, found.inputs, stream=stream.name), plain)
                    other = run_from(*args, state * 1.5 + 0.25, found.inputs, stream=stream.name)
                    assert not same_bits(other, plain), "the given state is not used"
                    assert same_bits(state, before), "the caller's tensor was written to"

    def test_the_pilot_proves_it(self, name: str, dtype: torch.dtype) -> None:
        found = case(name, dtype)
        pilot = fly(found.module, found.inputs, found.anatomy)
        assert pilot.verdict.exact
        assert pilot.verdict.worst == 0.0
        assert pilot.head_exact


@pytest.mark.parametrize("name", zoo.names())
def test_dropping_nothing_is_the_baseline_and_dropping_something_is_not(name: str) -> None:
    found = case(name)
    _, plain, _ = watched(found)
    for stream in found.anatomy.streams:
        for sublayer in stream.sublayers:
            with torch.no_grad(), eager_math():
                with edit(found.module, found.anatomy, writes={sublayer.index: torch.clone}, stream=stream.name):
                    assert same_bits(invoke(found.module, found.inputs), plain)
                with edit(found.module, found.anatomy, writes={sublayer.index: torch.zeros_like}, stream=stream.name):
                    assert not same_bits(invoke(found.module, found.inputs), plain)


def test_zeroing_a_write_equals_a_forward_written_by_hand() -> None:
    found = case("nanogpt")
    model: Any = found.module
    ids = found.inputs if isinstance(found.inputs, Tensor) else next(iter(found.inputs.values()))
    with torch.no_grad():
        inner = model.transformer
        x = inner.wte(ids) + inner.wpe(torch.arange(ids.shape[1]))
        for index, block in enumerate(inner.h):
            x = x + block.attn(block.ln_1(x))
            if index != 1:
                x = x + block.mlp(block.ln_2(x))
        by_hand = model.lm_head(inner.ln_f(x))
        label = found.anatomy.stream().find("1_mlp_out")
        with edit(model, found.anatomy, writes={label.index: torch.zeros_like}):
            assert same_bits(invoke(model, found.inputs), by_hand)


def test_nested_edits_compose() -> None:
    found = case("gpt2")
    model, anatomy = found.module, found.anatomy
    with torch.no_grad():
        with edit(model, anatomy, writes={0: lambda w: w * 2, 3: torch.zeros_like}):
            together = invoke(model, found.inputs)
        with edit(model, anatomy, writes={0: lambda w: w * 2}), edit(model, anatomy, writes={3: torch.zeros_like}):
            nested = invoke(model, found.inputs)
    assert same_bits(together, nested)


def test_an_edited_state_is_read_and_carried_on() -> None:
    """In a pre-norm model a shift of x_k must reach the branch as well as the skip."""
    found = case("user_pre_norm")
    shift = torch.randn(found.anatomy.stream().d_model)
    with torch.no_grad(), observe(found.module, found.anatomy) as before:
        invoke(found.module, found.inputs)
    shifted = edit(found.module, found.anatomy, states={2: lambda x: x + shift})
    with torch.no_grad(), observe(found.module, found.anatomy) as after, shifted:
        invoke(found.module, found.inputs)
    assert same_bits(after.states["main"][2], before.states["main"][2] + shift)
    assert not same_bits(after.writes["main"][2], before.writes["main"][2])
    assert same_bits(after.writes["main"][1], before.writes["main"][1])


def test_gradients_flow_through_edits_and_observation() -> None:
    found = case("gpt2")
    leaf = torch.zeros(found.anatomy.stream().d_model, requires_grad=True)
    with edit(found.module, found.anatomy, writes={1: lambda w: w + leaf}):
        torch.autograd.backward(invoke(found.module, found.inputs).square().sum())
    assert leaf.grad is not None
    assert leaf.grad.abs().sum() > 0


def test_hooks_are_removed_when_the_body_raises() -> None:
    found = case("bert")
    with pytest.raises(ValueError, match="mine"), observe(found.module, found.anatomy):
        raise ValueError("mine")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in found.module.modules())
    assert torch.backends.mha.get_fastpath_enabled()


def test_an_index_out_of_range_is_refused() -> None:
    found = case("gpt2")
    with pytest.raises(MissingDataError, match="has sublayers 0 to 5, not 6"):
        edit(found.module, found.anatomy, writes={6: torch.clone})
    with pytest.raises(MissingDataError, match="has states 0 to 6, not -8"):
        run_from(found.module, found.anatomy, -8, torch.zeros(1, 1, 32), found.inputs)


def test_an_anatomy_of_another_model_is_refused() -> None:
    watching = observe(case("bert").module, case("gpt2").anatomy)
    with pytest.raises(AnatomyError, match="belongs to another model"), watching:
        pass


@pytest.mark.parametrize("defer", [False, True])
def test_comparisons_give_the_same_verdict_at_once_and_queued(defer: bool) -> None:
    """Queued is how they run on an accelerator."""
    stream = case("gpt2").anatomy.stream()
    seen = torch.randn(3, 11, 32)
    wrong = seen + 1e-3 * torch.randn_like(seen)
    verdict = Verdict(defer=defer)
    for state, replayed in enumerate([seen.clone(), wrong, seen + 1e-6]):
        verdict.note(stream, state, replayed, seen)
    verdict.resolve()
    assert not verdict.exact
    assert verdict.state == 1
    assert verdict.worst == pytest.approx(float((wrong - seen).double().norm() / seen.double().norm()))


def test_the_bound_is_two_roundings() -> None:
    assert bound(torch.bfloat16) == 2 * 2**-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(), (3,), (4, 5), (2, 3, 8)])
def test_same_bits_sees_every_bit_at_every_alignment(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """The comparison is made on wide integers, which a slice may not fit: no value may escape at the edges."""
    tensor = torch.randn(shape).to(dtype)
    shifted = torch.cat([torch.zeros(1).to(dtype), tensor.reshape(-1)])[1:].view(shape)
    assert same_bits(tensor, shifted)
    for place in range(tensor.numel()):
        other = tensor.clone()
        other.view(-1).view(torch.uint8)[place * dtype.itemsize] ^= 1
        assert not same_bits(tensor, other)
        assert not same_bits(shifted, other)


def test_same_bits_is_about_bits_not_values() -> None:
    nan = torch.tensor([float("nan"), 1.0])
    assert same_bits(nan, nan.clone())
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same_bits(torch.zeros(2), torch.zeros(2, dtype=torch.float64))
    assert not same_bits(torch.zeros(2, 3), torch.zeros(3, 2))
