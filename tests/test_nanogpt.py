"""nanoGPT checkpoints: the arithmetic against GPT-2's, and what is refused."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from streamlens.checkpoint.loading import load
from streamlens.checkpoint.model import wrap
from streamlens.checkpoint.nanogpt import NanoGPT, NanoGPTConfig
from streamlens.errors import CheckpointError

CONFIG = NanoGPTConfig(block_size=13, vocab_size=29, n_layer=3, n_head=2, n_embd=8)
ARGS = dataclasses.asdict(CONFIG) | {"dropout": 0.2}


def randomised(config: NanoGPTConfig, seed: int = 0) -> NanoGPT:
    """Weights of order one everywhere, so that a forgotten bias or norm shows."""
    generator = torch.Generator().manual_seed(seed)
    model = NanoGPT(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return model.eval().requires_grad_(False)


def some_ids(positions: int = 13) -> Tensor:
    return torch.randint(CONFIG.vocab_size, (2, positions), generator=torch.Generator().manual_seed(1))


def checkpoint(model: NanoGPT, prefix: str = "_orig_mod.") -> dict[str, Any]:
    """What nanoGPT's train.py writes."""
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    args = dataclasses.asdict(model.config) | {"dropout": 0.2}
    return {"model": state, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}, "model_args": args, "iter_num": 7}


@pytest.mark.parametrize("bias", [True, False])
def test_logits_are_those_of_gpt2(bias: bool) -> None:
    transformers: Any = importlib.import_module("transformers")
    ours = randomised(dataclasses.replace(CONFIG, bias=bias))
    sizes = {"n_layer": 3, "n_head": 2, "n_embd": 8, "n_positions": 13, "vocab_size": 29}
    config = transformers.GPT2Config(**sizes, activation_function="gelu", bos_token_id=0, eos_token_id=0)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    state = {name: torch.zeros_like(value) for name, value in theirs.state_dict().items()}
    for name, value in ours.state_dict().items():
        # transformers keeps GPT-2's projections as (in, out)
        is_projection = ".c_" in name and name.endswith("weight")
        state[name] = value.T if is_projection else value
    theirs.load_state_dict(state)
    with torch.no_grad():
        expected = theirs(some_ids()).logits
    torch.testing.assert_close(ours(some_ids()), expected, atol=2e-5, rtol=1e-5)


def test_too_many_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="14 positions given, but the model has 13"):
        randomised(CONFIG)(some_ids(14))


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module."])
def test_training_checkpoint_loads(tmp_path: Path, prefix: str) -> None:
    model = randomised(CONFIG)
    torch.save(checkpoint(model, prefix), tmp_path / "ckpt.pt")
    loaded = load(tmp_path / "ckpt.pt")
    assert torch.equal(loaded.module(some_ids()), model(some_ids()))
    assert loaded.config == dataclasses.asdict(CONFIG)
    assert (loaded.vocab_size, loaded.max_positions, loaded.tokenizer) == (29, 13, None)
    assert loaded.sha256 == load(model).sha256
    moved = wrap(randomised(CONFIG), "ckpt.pt", loaded.config, device="meta")
    assert (moved.sha256, moved.module.get_parameter("lm_head.weight").is_meta) == (loaded.sha256, True)


def test_bare_state_dict_needs_its_model_args(tmp_path: Path) -> None:
    model = randomised(CONFIG)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=r"without a config.*--config.*--model"):
        load(tmp_path / "weights.pt")
    assert torch.equal(load(tmp_path / "weights.pt", config=ARGS).module(some_ids()), model(some_ids()))


def test_stored_masks_are_no_weights_and_one_of_two_tied_names_is_enough(tmp_path: Path) -> None:
    model = randomised(CONFIG)
    content = checkpoint(model)
    for layer in range(3):
        content["model"][f"_orig_mod.transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 13, 13)
    del content["model"]["_orig_mod.lm_head.weight"]
    torch.save(content, tmp_path / "ckpt.pt")
    loaded = load(tmp_path / "ckpt.pt").module
    assert torch.equal(loaded(some_ids()), model(some_ids()))
    assert loaded.get_parameter("lm_head.weight") is loaded.get_parameter("transformer.wte.weight")


def test_every_weight_keeps_its_dtype(tmp_path: Path) -> None:
    torch.save(checkpoint(randomised(CONFIG).bfloat16()), tmp_path / "ckpt.pt")
    assert {p.dtype for p in load(tmp_path / "ckpt.pt").module.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in load(tmp_path / "ckpt.pt", dtype="float32").module.parameters()} == {torch.float32}


def test_untied_weights_are_another_model(tmp_path: Path) -> None:
    content = checkpoint(randomised(CONFIG), "")
    content["model"]["lm_head.weight"] = content["model"]["lm_head.weight"] + 1
    torch.save(content, tmp_path / "ckpt.pt")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight' are one parameter in the model, but differ"):
        load(tmp_path / "ckpt.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layer": 10**9}, "n_layer is 1000000000 in the config, the weights have 3 layers"),
        ({"n_kv_head": 1}, r"\['n_kv_head'\] are not nanoGPT's"),
        ({"n_embd": 9}, "n_embd 9 does not divide into n_head 2"),
        ({"vocab_size": None}, "positive integers"),
        ({"bias": 1}, "bias as true or false"),
        ({"bias": False}, r"config and weights disagree: 19 unknown to the model \('transformer\.h\.0"),
        ({"vocab_size": 30}, r"'lm_head\.weight' is \(29, 8\) in the weights, \(30, 8\) in the model"),
        ({"block_size": 14}, r"'transformer\.wpe\.weight' is \(13, 8\) in the weights, \(14, 8\) in the model"),
    ],
)
def test_config_and_weights_must_agree(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    content = checkpoint(randomised(CONFIG))
    content["model_args"] |= change
    torch.save(content, tmp_path / "ckpt.pt")
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "ckpt.pt")
