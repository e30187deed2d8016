"""pack, then load: the same model bit for bit, in one file that torch reads without running code."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fixtures import zoo
from streamlens.checkpoint.loading import load
from streamlens.checkpoint.model import Model
from streamlens.checkpoint.nanogpt import NanoGPT, NanoGPTConfig
from streamlens.checkpoint.packing import pack
from streamlens.checkpoint.pretrained import tokenizer_in
from streamlens.checkpoint.tokenizers import ByteTokenizer, HFTokenizer, JsonTokenizer, from_hf
from streamlens.errors import CheckpointError, StorageError, UsageError


def nanogpt(**change: Any) -> Model:
    torch.manual_seed(0)
    config = NanoGPTConfig(**({"block_size": 13, "vocab_size": 29, "n_layer": 2, "n_head": 2, "n_embd": 8} | change))
    return load(NanoGPT(config))


def run(module: nn.Module, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        output: Tensor = module(**inputs)[0]
    return output


def tokenizer_text(truncate: bool = False) -> str:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {"[UNK]": 0, "<s>": 1, "the": 2, "cat": 3, "é": 9}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    if truncate:
        tokenizer.enable_truncation(2)
        tokenizer.enable_padding(length=6)
    text: str = tokenizer.to_str(pretty=truncate)
    return text


@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral", "mpt", "opt", "bert_model", "t5", "vit"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_transformers_model_comes_back_bit_for_bit(tmp_path: Path, name: str, attention: str) -> None:
    specimen = zoo.build(name)
    theirs: Any = specimen.module
    if name != "mpt":  # which has one form only
        theirs.set_attn_implementation(attention)
    model = load(theirs)
    path = pack(model, tmp_path / "model.pt")
    back = load(path)
    assert torch.equal(run(back.module, specimen.inputs), run(model.module, specimen.inputs))
    assert (back.sha256, back.config, back.source) == (model.sha256, model.config, str(path))
    rebuilt: Any = back.module
    assert rebuilt.config._attn_implementation == theirs.config._attn_implementation


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpt_comes_back_bit_for_bit(tmp_path: Path, bias: bool) -> None:
    model = nanogpt(bias=bias)
    back = load(pack(model, tmp_path / "model.pt"))
    ids = torch.arange(13)[None]
    assert torch.equal(back.module(ids), model.module(ids))
    assert (back.sha256, back.config, back.max_positions) == (model.sha256, model.config, 13)


def test_file_holds_plain_data(tmp_path: Path) -> None:
    model = nanogpt()
    model.tokenizer = ByteTokenizer()
    content = torch.load(pack(model, tmp_path / "model.pt"), weights_only=True)
    assert list(content) == ["format", "format_version", "architecture", "state_dict", "buffers", "tokenizer"]
    assert (content["format"], content["format_version"]) == ("streamlens-model", 1)
    assert content["architecture"] == {
        "kind": "nanogpt",
        "args": {"block_size": 13, "vocab_size": 29, "n_layer": 2, "n_head": 2, "n_embd": 8, "bias": True},
    }
    assert content["tokenizer"] == {"kind": "byte"}
    assert torch.equal(content["state_dict"]["lm_head.weight"], model.module.get_parameter("lm_head.weight"))


def test_tied_and_sliced_weights_take_only_the_room_they_need(tmp_path: Path) -> None:
    model = nanogpt(vocab_size=10_000)
    table = model.module.get_parameter("transformer.wte.weight")
    table.data = torch.cat([table.data] * 3)[:10_000]  # a view of a storage three times as large
    weights = sum(parameter.nbytes for parameter in model.module.parameters())
    assert pack(model, tmp_path / "model.pt").stat().st_size < 1.1 * weights
    back = load(tmp_path / "model.pt").module
    assert back.get_parameter("lm_head.weight") is back.get_parameter("transformer.wte.weight")


def test_several_dtypes_come_back(tmp_path: Path) -> None:
    model = load(zoo.build("llama").module)
    model.module.bfloat16()
    model.module.get_submodule("model.layers.1").half()
    model.module.get_submodule("model.norm").float()
    model = load(model.module)
    back = load(pack(model, tmp_path / "model.pt"))
    assert back.sha256 == model.sha256
    widened = load(tmp_path / "model.pt", dtype="float32").module
    assert {parameter.dtype for parameter in widened.parameters()} == {torch.float32}


def test_model_that_was_cast_as_a_whole_comes_back(tmp_path: Path) -> None:
    specimen = zoo.build("llama")
    model = load(specimen.module.to(torch.bfloat16))  # rounds the rotary frequencies, which no state dict holds
    assert {parameter.dtype for parameter in model.module.parameters()} == {torch.bfloat16}
    back = load(pack(model, tmp_path / "model.pt"))
    assert torch.equal(run(back.module, specimen.inputs), run(model.module, specimen.inputs))
    unrounded = load(tmp_path / "model.pt", dtype="bfloat16").module
    assert not torch.equal(run(unrounded, specimen.inputs), run(model.module, specimen.inputs))


def test_tokenizers_come_back(tmp_path: Path) -> None:
    model = nanogpt()
    for tokenizer in (ByteTokenizer(), JsonTokenizer(tokenizer_text(), "theirs"), None):
        model.tokenizer = tokenizer
        back = load(pack(model, tmp_path / "model.pt")).tokenizer
        if tokenizer is None or back is None:
            assert back is tokenizer
            continue
        assert (back.name, back.vocab_size, back.fingerprint) == (
            tokenizer.name,
            tokenizer.vocab_size,
            tokenizer.fingerprint,
        )
        assert back.encode("the cat é") == tokenizer.encode("the cat é")


def test_json_tokenizer_adds_its_template_and_never_cuts_or_pads() -> None:
    plain, cutting = JsonTokenizer(tokenizer_text(), "a"), JsonTokenizer(tokenizer_text(truncate=True), "b")
    assert cutting.encode("the cat the cat") == [1, 2, 3, 2, 3]
    assert cutting.fingerprint == plain.fingerprint
    assert plain.vocab_size == 10  # ids have a gap
    assert plain.decode([1, 2, 3]) == "<s> the cat"
    other = JsonTokenizer(tokenizer_text().replace('"cat"', '"dog"'), "a")
    assert other.fingerprint != plain.fingerprint
    for text in ("{}", "[]", "not json"):
        with pytest.raises(CheckpointError, match=r"not a tokenizer\.json"):
            JsonTokenizer(text, "x")


def test_byte_tokenizer_shows_ids_that_are_no_bytes() -> None:
    text = "naïve\x00\r\n🙂"
    assert ByteTokenizer().decode(ByteTokenizer().encode(text)) == text
    assert ByteTokenizer().decode([104, 300, 105, 195]) == "h\ufffdi\ufffd"


def test_tokenizer_of_a_folder(tmp_path: Path) -> None:
    transformers: Any = importlib.import_module("transformers")
    assert tokenizer_in(tmp_path) is None
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nthe\ncat\n")
    assert tokenizer_in(tmp_path) is None  # not the folder of a model
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    from_vocabulary = tokenizer_in(tmp_path)
    assert from_vocabulary is not None
    assert from_vocabulary.encode("the cat") == [2, 5, 6, 3]
    (tmp_path / "tokenizer.json").write_text(tokenizer_text())
    from_json = tokenizer_in(tmp_path)
    assert from_json is not None
    assert (from_json.name, from_json.encode("the cat")) == (tmp_path.name, [1, 2, 3])
    fast = from_hf(transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json")), "fast")
    assert fast.fingerprint == from_json.fingerprint


class TwoWords:
    """A tokenizer in Python, with the four methods of a Hugging Face one that are used."""

    def get_vocab(self) -> dict[str, int]:
        return {"the": 4, "cat": 5}

    def encode(self, text: str) -> list[int]:
        return [self.get_vocab()[word] for word in text.split()]

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return " ".join(["the", "cat"][i - 4] for i in ids) + str(skip_special_tokens)


def test_python_tokenizer_is_used_but_not_packed(tmp_path: Path) -> None:
    model = nanogpt()
    model.tokenizer = tokenizer = from_hf(TwoWords(), "two words")
    assert isinstance(tokenizer, HFTokenizer)
    assert (tokenizer.vocab_size, tokenizer.encode("cat the"), tokenizer.decode([5])) == (6, [5, 4], "catFalse")
    with pytest.raises(CheckpointError, match=r"two words has no tokenizer\.json and cannot be packed"):
        pack(model, tmp_path / "model.pt")
    assert list(tmp_path.iterdir()) == []


def test_other_classes_need_a_factory(tmp_path: Path) -> None:
    theirs: Any = zoo.build("gpt2").module
    # A subclass is not the class that transformers would build from the config.
    changed = type("Changed", (type(theirs),), {})(theirs.config)
    for module in (nn.Embedding(3, 3), changed):
        with pytest.raises(CheckpointError, match=r"cannot be rebuilt from a config.*--model package\.module:factory"):
            pack(load(module), tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format version 2, this streamlens reads up to 1: update it"),
        ({"format_version": None}, "format version None"),
        ({"architecture": {"kind": "perceptron"}}, "unknown architecture 'perceptron'"),
        ({"architecture": None}, "damaged packed model"),
        ({"architecture": {"kind": "nanogpt", "args": 3}}, "damaged packed model"),
        ({"state_dict": None}, "no state_dict"),
        ({"tokenizer": {"kind": "words"}}, "unknown tokenizer 'words'"),
        ({"tokenizer": {"kind": "tokenizer.json", "json": "{}", "name": "x"}}, "not a tokenizer.json"),
    ],
)
def test_newer_and_damaged_files(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = pack(nanogpt(), tmp_path / "model.pt")
    torch.save(torch.load(path, weights_only=True) | change, path)
    with pytest.raises(CheckpointError, match=message):
        load(path)


def test_file_appears_complete_or_not_at_all(tmp_path: Path) -> None:
    model = nanogpt()
    with pytest.raises(StorageError, match="could not be written"):
        pack(model, tmp_path / "no-such-folder" / "model.pt")
    path = tmp_path / "model.pt"
    path.write_bytes(b"what was there")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError, match="could not be written"):
        pack(model, tmp_path / "folder")
    assert path.read_bytes() == b"what was there"
    pack(model, path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["folder", "model.pt"]
    with pytest.raises(UsageError, match="loaded from"):
        pack(load(path), path)


def test_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    signal = pytest.importorskip("signal")
    path = tmp_path / "model.pt"
    path.write_bytes(b"what was there")
    model = nanogpt(vocab_size=10_000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(StorageError, match="could not be written"):
            pack(model, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    assert [entry.read_bytes() for entry in tmp_path.iterdir()] == [b"what was there"]
