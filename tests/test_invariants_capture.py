"""Laws of a capture (METHODS.md, T-C1 to T-C5), each against modules called by hand, never against a replay."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import streamlens as sl
from fixtures import zoo
from streamlens.anatomy import Stream
from streamlens.calling import eager_math, invoke
from streamlens.observation import observe, tokens
from streamlens.proof import same_bits
from streamlens.reader.opening import Capture
from streamlens.reader.stream import StreamView
from tests.conftest import Case, case

DOCS = 3
DTYPES = [torch.float32, torch.bfloat16]
HALF = ["mamba", "gpt2", "llama", "gemma2", "gptj", "granite", "olmo2", "bert", "t5", "user_post_norm", "deepnorm"]
EVERY = [*((name, torch.float32) for name in zoo.names()), *((name, torch.bfloat16) for name in HALF)]
Branch = Callable[[Tensor], Tensor]


def stored(found: Case, path: Path, stream: Stream | None = None, **options: Any) -> Capture:
    """Capture one stream, by default in one batch, so that a file's shapes are the model's own."""
    name = (stream or found.anatomy.stream()).name
    options.setdefault("batch_tokens", 4096)
    return sl.capture(found.module, inputs=found.inputs, out=path, streams=[name], progress=False, **options)


@contextmanager
def quietly() -> Iterator[None]:
    with torch.no_grad(), eager_math():
        yield


def flat(tensor: Tensor, stream: Stream) -> Tensor:
    """Bring a tensor of a whole batch into (token, d_model)."""
    return tokens(tensor, stream, DOCS, tensor.numel() // (DOCS * stream.d_model)).flatten(0, 1)


def in_own_layout(tensor: Tensor, stream: Stream) -> Tensor:
    """Bring (token, d_model) into the model's own (doc, position, d_model) or (position, doc, d_model)."""
    whole = tensor.clone().reshape(DOCS, -1, stream.d_model)
    return whole.transpose(0, 1).contiguous() if stream.position_first else whole


# ---- T-C4: what was read, given to the branch, is what was written ---------------------------------------------------


@pytest.mark.parametrize(("name", "dtype"), EVERY, ids=str)
def test_a_stored_read_given_to_its_branch_is_the_stored_write(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """T-C4, for every branch of every stream: the model itself, started from what the file says was read."""
    found = case(name, dtype)
    for stream in found.anatomy.streams:
        with stored(found, tmp_path / f"{stream.name}.h5", stream) as capture, quietly():
            view = capture.stream(stream.name)
            for k, group in itertools.groupby(stream.sublayers, key=lambda s: s.read):
                branches = list(group)
                for branch in branches:
                    read = view.read(branch.label).clone().reshape(DOCS, -1, stream.d_model)
                    with observe(found.module, found.anatomy) as seen:
                        sl.run_from(found.module, found.anatomy, k, read, found.inputs, stream=stream.name)
                    for s in branches:
                        written = flat(seen.writes[stream.name][s.index], stream)
                        assert same_bits(written, view.write(s.label)), (stream.name, s.label)


def _asked(module: nn.Module, found: Case) -> dict[str, Any]:
    """Return the keyword arguments with which the model calls one of its modules: masks, rotations."""
    asked: dict[str, Any] = {}

    def hook(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        asked.update(kwargs)

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    with quietly():
        invoke(found.module, found.inputs)
    handle.remove()
    asked.pop("hidden_states", None)
    return asked


def by_hand(found: Case) -> list[Branch]:
    """Write down each branch as the model's source code has it, in the order of the writes."""
    m: Any = found.module

    def attn(module: nn.Module) -> Branch:
        asked = _asked(module, found)
        return lambda x: module(x, **asked)[0]

    if found.name == "nanogpt":
        return [f for b in m.transformer.h for f in (_of(b.ln_1, b.attn), _of(b.ln_2, b.mlp))]
    if found.name == "gpt2":
        return [f for b in m.transformer.h for f in (_of(b.ln_1, attn(b.attn)), _of(b.ln_2, b.mlp))]
    if found.name == "gptj":
        return [f for b in m.transformer.h for f in (_of(b.ln_1, attn(b.attn)), _of(b.ln_1, b.mlp))]
    if found.name == "user_post_norm":
        return [
            f
            for b in m.layers
            for f in (lambda r, b=b: b.attention(r, r, r)[0], _of(b.linear1, b.activation, b.linear2))
        ]
    if found.name == "bert":
        return [
            f
            for b in m.bert.encoder.layer
            for f in (
                _of(attn(b.attention.self), b.attention.output.dense),
                _of(b.intermediate, b.output.dense),
            )
        ]
    if found.name == "t5":
        return [f for b in m.decoder.block for f in _t5_layers(b, attn)]
    if found.name == "bart":
        return [
            f
            for b in m.model.decoder.layers
            for f in (attn(b.self_attn), attn(b.encoder_attn), _of(b.fc1, b.activation_fn, b.fc2))
        ]
    layers = m.model.layers
    if found.name == "gemma2":
        return [
            f
            for b in layers
            for f in (
                _of(b.input_layernorm, attn(b.self_attn), b.post_attention_layernorm),
                _of(b.pre_feedforward_layernorm, b.mlp, b.post_feedforward_layernorm),
            )
        ]
    factor = 0.4 if found.name == "granite" else 1.0
    return [
        f
        for b in layers
        for f in (
            _of(b.input_layernorm, attn(b.self_attn), lambda w: w * factor),
            _of(b.post_attention_layernorm, b.mlp, lambda w: w * factor),
        )
    ]


def _t5_layers(block: Any, attn: Callable[[nn.Module], Branch]) -> list[Branch]:
    own, cross, mlp = block.layer
    return [
        _of(own.layer_norm, attn(own.SelfAttention)),
        _of(cross.layer_norm, attn(cross.EncDecAttention)),
        _of(mlp.layer_norm, mlp.DenseReluDense),
    ]


def _of(*functions: Branch) -> Branch:
    def branch(x: Tensor) -> Tensor:
        for function in functions:
            x = function(x)
        return x

    return branch


BY_HAND = ["gpt2", "nanogpt", "user_post_norm", "gemma2", "granite", "gptj", "bert", "llama", "t5", "bart"]


@pytest.mark.parametrize("name", BY_HAND)
def test_a_stored_read_through_modules_called_by_hand_is_the_stored_write(name: str, tmp_path: Path) -> None:
    """T-C4, and nothing of this library between the two halves of the file."""
    found = case(name)
    stream = found.anatomy.stream()  # of two, the decoder
    branches = by_hand(found)
    assert len(branches) == len(stream.sublayers)
    with stored(found, tmp_path / "x.h5") as capture, quietly():
        view = capture.stream()
        for sublayer, branch in zip(stream.sublayers, branches, strict=True):
            read = in_own_layout(view.read(sublayer.label), stream)
            assert same_bits(flat(branch(read), stream), view.write(sublayer.label)), sublayer.label


# ---- T-C1, T-C2: the states are their writes -------------------------------------------------------------------------

SKIPS: dict[str, Callable[[Tensor, list[Tensor]], Tensor]] = {
    "gpt2": lambda x, w: w[0] + x,
    "llama": lambda x, w: x + w[0],
    "gptj": lambda x, w: (w[0] + w[1]) + x,
    "parallel_chain": lambda x, w: (x + w[0]) + w[1],
    "gpt_neox_parallel": lambda x, w: (w[1] + w[0]) + x,
    "gemma2": lambda x, w: x + w[0],
    "granite": lambda x, w: x + w[0],
    "t5": lambda x, w: x + w[0],
}
"""How each model's source code adds: x is the state, w are the writes that read it."""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SKIPS)
def test_states_are_a_plain_loop_over_the_file(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """T-C1 without a norm on the stream: each sum, in the order of the model's own code, is what is read next."""
    found = case(name, dtype)
    for stream in found.anatomy.streams:
        with stored(found, tmp_path / f"{stream.name}.h5", stream) as capture:
            view = capture.stream(stream.name)
            x = view.read(0)
            for k, step in enumerate(stream.steps):
                x = SKIPS[name](x, [view.write(s) for s in step.sublayers])
                readers = [s.label for s in stream.sublayers if s.read == k + 1]
                for after in [view.read(label) for label in readers] or [view.final]:
                    assert same_bits(x, after), stream.state_labels[k + 1]


def norms_after(found: Case, stream: Stream) -> list[nn.Module]:
    """Return the norms that stand after the additions, in order, from the model's own modules."""
    m: Any = found.module
    if found.name == "bart":
        names = ["self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"]
        layers = m.get_submodule(f"model.{stream.name}").layers
        return [getattr(b, n) for b in layers for n in names if hasattr(b, n)]
    if found.name == "bert":
        layers = m.bert.encoder.layer
        return [n for b in layers for n in (b.attention.output.LayerNorm, b.output.LayerNorm)]
    first, second = ("ln1", "ln2") if found.name == "deepnorm" else ("norm1", "norm2")
    return [n for b in m.layers for n in (getattr(b, first), getattr(b, second))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["bert", "user_post_norm", "deepnorm", "encoder_post", "bart"])
def test_the_own_norm_of_a_stored_sum_is_the_next_read(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """T-C1 with a norm after the addition: the model's own module makes the next state of what the file holds."""
    found = case(name, dtype)
    factor = 1.5 if name == "deepnorm" else 1.0
    for stream in found.anatomy.streams:
        norms = norms_after(found, stream)
        assert len(norms) == len(stream.steps)
        with stored(found, tmp_path / f"{stream.name}.h5", stream) as capture, quietly():
            view = capture.stream(stream.name)
            for s, norm in enumerate(norms):
                made = norm(in_own_layout(factor * view.read(s) + view.write(s), stream))
                after = view.read(s + 1) if s + 1 < len(norms) else view.final
                assert same_bits(flat(made, stream), after), stream.labels[s]


@pytest.mark.parametrize("name", ["gpt2", "llama", "gptj", "gemma2", "granite", "t5", "bloom", "mamba", "nanogpt"])
def test_the_order_of_the_sum_does_not_matter(name: str, tmp_path: Path) -> None:
    """T-C2."""
    found = case(name)
    with stored(found, tmp_path / "x.h5") as capture:
        view, stream = capture.stream(), found.anatomy.stream()
        # Bloom has a norm between its embedding and the first state, which is then a term by itself.
        parts = [view.state(0)] if name == "bloom" else [view.embed(p.label) for p in stream.parts]
        for k in range(len(stream.states)):
            terms = [*parts, *(view.write(s) for step in stream.steps[:k] for s in step.sublayers)]
            assert worst_of_orders(terms, view.state(k)) < 1e-5, stream.state_labels[k]


def worst_of_orders(terms: list[Tensor], state: Tensor) -> float:
    """Return the largest relative distance of any order's sum from the state."""
    shuffled = [terms[i] for i in torch.randperm(len(terms), generator=torch.Generator().manual_seed(0))]
    sums = [_chain(terms), _chain(terms[::-1]), _chain(shuffled), _pairwise(terms)]
    return max(float((total - state).norm() / state.norm()) for total in sums)


def _chain(terms: list[Tensor]) -> Tensor:
    total = terms[0].clone()
    for term in terms[1:]:
        total += term
    return total


def _pairwise(terms: list[Tensor]) -> Tensor:
    while len(terms) > 1:
        terms = [_chain(terms[i : i + 2]) for i in range(0, len(terms), 2)]
    return terms[0]


# ---- T-C3: looking changes nothing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*BY_HAND, "mamba"])
def test_looking_at_heads_and_capturing_change_no_bit_of_the_output(name: str, tmp_path: Path) -> None:
    """T-C3; the calls before and after are the user's own, with none of this library's contexts around them."""
    found = case(name)
    with torch.no_grad():
        before = invoke(found.module, found.inputs)
        with observe(found.module, found.anatomy, mixes=True):
            assert same_bits(invoke(found.module, found.inputs), before)
        stored(found, tmp_path / "x.h5", heads=True).close()
        assert same_bits(invoke(found.module, found.inputs), before)
    for module in found.module.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "forward" not in vars(module)


# ---- T-C5: the file is what was seen, however it was cut -------------------------------------------------------------

SHAPES = ["gpt2", "gptj", "gemma2", "bert", "bart", "granite", "olmo2", "bloom", "albert", "deepnorm"]
SHAPES += ["scaled_skip_parameter", "flat_tokens", "user_post_norm", "t5", "transformer_post"]


@pytest.mark.parametrize("name", SHAPES)
def test_full_and_compact_files_are_what_was_observed(name: str, tmp_path: Path) -> None:
    """T-C5: every dataset, in one batch, has the bits that `observe` saw."""
    found = case(name)
    with quietly(), observe(found.module, found.anatomy) as seen:
        invoke(found.module, found.inputs)
    for stream in found.anatomy.streams:
        for compact in (False, True):
            path = tmp_path / f"{stream.name}_{compact}.h5"
            with stored(found, path, stream, compact=compact) as capture:
                view = capture.stream(stream.name)
                _equal(view, stream, seen.states[stream.name], seen.writes[stream.name])
                for part in stream.parts:
                    own = seen.parts[stream.name][stream.parts.index(part)]
                    positions = capture.n_tokens // DOCS
                    assert same_bits(view.embed(part.label), tokens(own, stream, DOCS, positions).flatten(0, 1))


def _equal(view: StreamView, stream: Stream, states: dict[int, Tensor], writes: dict[int, Tensor]) -> None:
    for k in range(len(stream.states)):
        assert same_bits(view.state(k).contiguous(), flat(states[k], stream)), (stream.name, k)
    for s in stream.sublayers:
        assert same_bits(view.write(s.label), flat(writes[s.index], stream)), (stream.name, s.label)
        assert same_bits(view.read(s.label).contiguous(), flat(states[s.read], stream)), (stream.name, s.label)


@pytest.mark.parametrize("name", SHAPES)
def test_however_the_text_is_cut_into_batches(name: str, tmp_path: Path) -> None:
    """T-C5: one batch, two documents and then one, and one by one; the sums of a product may round otherwise."""
    found = case(name)
    stream = found.anatomy.stream()
    with stored(found, tmp_path / "whole.h5") as whole:
        length = whole.n_tokens // DOCS
        for docs, stops in ((1, [length, 2 * length, 3 * length]), (2, [2 * length, 3 * length])):
            with stored(found, tmp_path / f"{docs}.h5", batch_tokens=docs * length) as cut:
                assert [b.stop for b in cut.stream(stream.name).blocks()] == stops
                for column in ("id", "doc", "position"):
                    assert torch.equal(getattr(cut.tokens, column), getattr(whole.tokens, column))
                for what in ("writes", "reads", "final"):
                    ours, theirs = (getattr(c.stream(stream.name), what) for c in (cut, whole))
                    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
