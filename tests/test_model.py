"""Which model it is (the fingerprint) and how much it can be given (the limits)."""

from __future__ import annotations

import hashlib

import pytest
import torch
from torch import Tensor, nn

from fixtures import zoo
from streamlens.checkpoint import model as model_module
from streamlens.checkpoint.limits import position_limit
from streamlens.checkpoint.loading import fingerprint, load
from streamlens.errors import CheckpointError


def test_fingerprint_is_the_hash_that_its_words_say() -> None:
    module = nn.ModuleDict({"b": nn.Embedding(3, 4), "a": nn.Linear(4, 2)}).bfloat16()
    config = {"b": 1, "a": [2]}
    digest = hashlib.sha256(b'{"a":[2],"b":1}')
    for name in ("a.bias", "a.weight", "b.weight"):
        value = module.state_dict()[name]
        digest.update(f"\n{name} torch.bfloat16 {tuple(value.shape)}\n".encode())
        digest.update(bytes(value.contiguous().view(torch.uint8).flatten().tolist()))
    assert fingerprint(module, config) == digest.hexdigest()


def test_fingerprint_sees_every_bit_dtype_shape_and_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def of(value: Tensor, name: str = "x") -> str:
        module = nn.Module()
        module.register_buffer(name, value)
        return fingerprint(module, {})

    values = torch.arange(24.0).reshape(4, 6)
    flipped = values.clone()
    flipped.view(torch.uint8)[3, -1] ^= 1
    others = [flipped, values.reshape(6, 4), values.view(torch.int32), values.T, values[:3], values * 1]
    hashes = [of(value) for value in others]
    assert len({of(values), of(values, "y"), *hashes[:-1]}) == 7
    assert hashes[-1] == of(values)
    strided = torch.arange(48.0).reshape(4, 12)[:, ::2]
    for chunk in (8, 40, 1 << 26):  # the size of the pieces must not matter
        monkeypatch.setattr(model_module, "_CHUNK_BYTES", chunk)
        assert of(values) == hashes[-1]
        assert of(strided) == of(strided.contiguous())
        assert of(values.T) == of(values.T.contiguous())
        assert of(torch.tensor(1.0)) != of(torch.zeros(0, 3))


def test_fingerprint_needs_values() -> None:
    with torch.device("meta"):
        module = nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match="'bias' is on the meta device"):
        load(module)


@pytest.mark.parametrize(
    ("name", "vocab", "positions"),
    [
        ("gpt2", 97, 29),
        ("roberta", 97, 28),  # a padding row comes first
        ("opt", 97, 29),  # two rows more than positions
        ("bart", 97, 29),
        ("gptj", 97, 29),  # rotary, but from a table
        ("bert", 97, 29),
        ("llama", 97, None),
        ("bloom", 97, None),
        ("t5", 97, None),
        ("vit", None, None),
    ],
)
def test_limits(name: str, vocab: int | None, positions: int | None) -> None:
    model = load(zoo.build(name).module)
    assert (model.vocab_size, model.max_positions) == (vocab, positions)


def test_limits_of_modules_without_a_config() -> None:
    class Sinusoid(nn.Module):
        def __init__(self, *shape: int) -> None:
            super().__init__()
            self.register_buffer("pe", torch.zeros(*shape), persistent=False)

    for shape in ((11, 1, 4), (1, 11, 4), (11, 4)):
        assert position_limit(Sinusoid(*shape), {}) == 11
    assert position_limit(Sinusoid(11, 3, 4), {}) is None
    positions_first = nn.ModuleDict({"a": nn.Embedding(11, 4), "b": nn.Embedding(17, 4), "c": nn.Linear(4, 17)})
    assert load(positions_first).vocab_size == 17
    assert load(nn.Linear(4, 4)).vocab_size is None
