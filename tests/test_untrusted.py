"""Files from strangers: a bomb in every disguise, and none goes off unless the user said that it may."""

from __future__ import annotations

import importlib
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from streamlens.checkpoint.loading import load
from streamlens.checkpoint.packing import pack
from streamlens.errors import CheckpointError, StreamlensError, UnsafeFileError

GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "n_layer": 1,
    "n_head": 2,
    "n_embd": 8,
    "n_positions": 13,
    "vocab_size": 29,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.sentinel),)


class Trapped(nn.Linear):
    """A module that carries one."""

    def __init__(self, bomb: Bomb) -> None:
        super().__init__(2, 2)
        self.bomb = bomb


@pytest.fixture
def sentinel(tmp_path: Path) -> Path:
    """A folder that exists once code from a file has run."""
    return tmp_path / "code-has-run"


def gpt2_weights() -> dict[str, torch.Tensor]:
    transformers: Any = importlib.import_module("transformers")
    return dict(transformers.GPT2LMHeadModel(transformers.GPT2Config.from_dict(GPT2)).state_dict())


def zip_files(bomb: Bomb) -> dict[str, Any]:
    """Contents for torch.save, each with the bomb in another place."""
    packed = {"format": "streamlens-model", "format_version": 1, "tokenizer": None, "state_dict": gpt2_weights()}
    architecture = {"kind": "transformers", "class": "GPT2LMHeadModel", "config": GPT2}
    return {
        "alone": bomb,
        "nested": {"state_dict": {"a": torch.zeros(2)}, "history": [1, {"x": (bomb,)}]},
        "as a key's value in model_args": {"model": {"a": torch.zeros(2)}, "model_args": {"n_layer": bomb}},
        "whole module": Trapped(bomb),
        "packed config": {**packed, "architecture": {**architecture, "config": {**GPT2, "x": bomb}}},
        "packed tokenizer": {**packed, "architecture": architecture, "tokenizer": {"kind": "byte", "x": bomb}},
    }


def test_no_disguise_of_a_pickle_runs(tmp_path: Path, sentinel: Path) -> None:
    for name, content in zip_files(Bomb(sentinel)).items():
        path = tmp_path / "model.pt"
        torch.save(content, path)
        with pytest.raises(UnsafeFileError, match=r"posix\.mkdir|nt\.mkdir") as caught:
            load(path)
        assert "--unsafe-pickle" in str(caught.value), name
        with pytest.raises(UnsafeFileError):
            load(path, factory=lambda: nn.Linear(2, 2))
        assert not sentinel.exists(), name


def test_bomb_goes_off_when_it_may(tmp_path: Path, sentinel: Path) -> None:
    torch.save(Trapped(Bomb(sentinel)), tmp_path / "model.pt")
    assert isinstance(load(tmp_path / "model.pt", unsafe_pickle=True).module, nn.Linear)
    assert sentinel.exists()


def test_permission_is_not_used_for_a_file_that_needs_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save({"weight": torch.zeros(2, 2), "bias": torch.zeros(2)}, tmp_path / "model.pt")
    load(tmp_path / "model.pt", factory=lambda: nn.Linear(2, 2), unsafe_pickle=True)
    assert not caplog.records


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors", "model.gguf", "pytorch_model.bin"])
def test_bare_pickle_does_not_run(tmp_path: Path, sentinel: Path, name: str) -> None:
    path = tmp_path / name
    for protocol in range(6):
        path.write_bytes(pickle.dumps(Bomb(sentinel), protocol))
        with pytest.raises(StreamlensError):
            load(path, unsafe_pickle=True)
    torch.save(Bomb(sentinel), path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError):
        load(path, unsafe_pickle=True)
    assert not sentinel.exists()


def test_pickle_as_config_does_not_run(tmp_path: Path, sentinel: Path) -> None:
    torch.save(gpt2_weights(), tmp_path / "weights.pt")
    for config in (pickle.dumps(Bomb(sentinel)), b"[1, 2]", b"\xff", b"[" * 100_000):
        (tmp_path / "evil.json").write_bytes(config)
        with pytest.raises(CheckpointError, match="config must be a JSON"):
            load(tmp_path / "weights.pt", config=tmp_path / "evil.json")
    torch.save(Bomb(sentinel), tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match="config must be a JSON"):
        load(tmp_path / "weights.pt", config=tmp_path / "evil.pt")
    assert not sentinel.exists()


def folder(path: Path, **config: Any) -> Path:
    from safetensors.torch import save_file

    path.mkdir(exist_ok=True)
    weights = gpt2_weights()
    del weights["lm_head.weight"]
    save_file(weights, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(GPT2 | config))
    return path


def test_code_beside_a_model_does_not_run(tmp_path: Path, sentinel: Path) -> None:
    path = folder(tmp_path / "model", auto_map={"AutoModelForCausalLM": "modeling_evil.GPT2LMHeadModel"})
    (path / "modeling_evil.py").write_text(f"import os; os.mkdir({str(sentinel)!r})")
    with pytest.raises(UnsafeFileError, match=r"auto_map names Python code.*modeling_evil.*live module"):
        load(path)
    path = folder(tmp_path / "model", text_config={"auto_map": {"AutoModel": "modeling_evil.X"}})
    with pytest.raises(UnsafeFileError, match="auto_map"):
        load(path)
    assert not sentinel.exists()


def test_pickles_beside_a_model_are_not_opened(tmp_path: Path, sentinel: Path) -> None:
    path = folder(tmp_path / "model")
    torch.save(Bomb(sentinel), path / "pytorch_model.bin")
    (path / "generation_config.json").write_bytes(pickle.dumps(Bomb(sentinel)))
    (path / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/evil", "peft_type": "LORA"}')
    assert load(path).vocab_size == 29
    (path / "tokenizer.json").write_bytes(pickle.dumps(Bomb(sentinel)))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        load(path)
    (path / "tokenizer.json").unlink()
    (path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no safetensors: give .*pytorch_model\.bin instead"):
        load(path)
    with pytest.raises(UnsafeFileError, match="mkdir"):
        load(path / "pytorch_model.bin")
    assert not sentinel.exists()


def test_config_cannot_choose_code(tmp_path: Path) -> None:
    kernels = "someone/evil-kernels"
    path = folder(
        tmp_path / "model",
        attn_implementation=kernels,
        _attn_implementation_internal=kernels,
        _attn_implementation=kernels,
    )
    model = load(path)
    theirs: Any = model.module
    assert type(theirs).__name__ == "GPT2LMHeadModel"
    assert theirs.config._attn_implementation in ("sdpa", "eager")
    assert kernels not in json.dumps(model.config)
    pack(model, tmp_path / "packed.pt")
    packed = torch.load(tmp_path / "packed.pt", weights_only=True)
    packed["architecture"]["implementations"] = {"attn": kernels, "kernel_config": kernels}
    torch.save(packed, tmp_path / "packed.pt")
    module: Any = load(tmp_path / "packed.pt").module
    assert module.config._attn_implementation in ("sdpa", "eager")


@pytest.mark.parametrize("name", ["Trainer", "pipeline", "__name__", "os", "AutoModel", "GPT9LMHeadModel", 3])
def test_architecture_must_be_a_model_class(tmp_path: Path, name: Any) -> None:
    with pytest.raises(CheckpointError, match=r"has no model class|names no class"):
        load(folder(tmp_path / "model", architectures=[name]))


def test_weights_index_cannot_leave_its_folder(tmp_path: Path) -> None:
    path = folder(tmp_path / "model")
    for name in ("../model/model.safetensors", str(path / "model.safetensors")):
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(UnsafeFileError, match="outside its folder"):
            load(path)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "part-2.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"lacks part-2\.safetensors"):
        load(path)
    (path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(CheckpointError, match="is damaged"):
        load(path)


def tensor_that_is_not_plain(kind: str) -> torch.Tensor:
    if kind == "sparse":
        return torch.eye(2).to_sparse()
    if kind == "csr":
        return torch.eye(2).to_sparse_csr()
    if kind == "float8":
        return torch.eye(2).to(torch.float8_e4m3fn)
    if kind == "quantised":
        return torch.quantize_per_tensor(torch.eye(2), 0.1, 0, torch.qint8)
    return torch.zeros(2, 2, device="meta")


@pytest.mark.filterwarnings("ignore:.*(Sparse|sparse|quantize|TypedStorage).*")
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("sparse", "sparse"),
        ("csr", "sparse"),
        ("float8", "quantised"),
        ("quantised", "quantised"),
        ("meta", "no values"),
    ],
)
def test_tensors_that_are_not_plain_are_refused(tmp_path: Path, kind: str, message: str) -> None:
    torch.save({"weight": tensor_that_is_not_plain(kind), "bias": torch.zeros(2)}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "model.pt", factory=lambda: nn.Linear(2, 2))


def test_dict_that_contains_itself_ends(tmp_path: Path) -> None:
    loop: dict[str, Any] = {}
    loop["model"] = loop
    torch.save(loop, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="no state_dict found"):
        load(tmp_path / "model.pt")


def test_quantised_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="quantised"):
        load(folder(tmp_path / "model", quantization_config={"quant_method": "gptq", "bits": 4}))
