"""Everything that is no model, or a damaged one, gets one sentence that says what to do."""

from __future__ import annotations

import io
import random
import shutil
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from streamlens.checkpoint.loading import load
from streamlens.checkpoint.pickles import require_safe_torch
from streamlens.checkpoint.sniff import FileKind, sniff
from streamlens.errors import CheckpointError, StreamlensError, UnsafeFileError


def saved(path: Path, **options: Any) -> Path:
    torch.save({"weight": torch.arange(64.0)}, path, **options)
    return path


def zipped(**entries: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return buffer.getvalue()


NOT_MODELS = {
    "empty": (b"", r"is empty \(0 bytes\)"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "`git lfs pull`"),
    "html": (b"\n<!DOCTYPE html><html><title>Sign in</title></html>", "web page.*download the file itself"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(100), "`streamlens inspect` and `streamlens verify`"),
    "npy": (b"\x93NUMPY\x01\x00" + bytes(100), "--tokens"),
    "gzip": (b"\x1f\x8b\x08" + bytes(100), "unpack it"),
    "json": (b'{"architectures": ["GPT2LMHeadModel"]}', "JSON text.*--config"),
    "zip": (zipped(readme=b"hello"), "zip archive without a torch checkpoint"),
    "empty zip": (zipped(), "empty zip archive"),
    "cut zip": (zipped(readme=b"hello")[:40], "cut short or damaged"),
    "text": (b"once upon a time", "no file that streamlens reads"),
    "one byte": (b"\x07", "no file that streamlens reads"),
}


@pytest.mark.parametrize("name", NOT_MODELS)
def test_wrong_file_is_named_and_answered(tmp_path: Path, name: str) -> None:
    content, advice = NOT_MODELS[name]
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=advice) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_torchscript_and_exported_programs_are_told_apart(tmp_path: Path) -> None:
    module = nn.Linear(2, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit announces its own end
        jit: Any = torch.jit
        jit.save(jit.trace(module, torch.zeros(1, 2)), str(tmp_path / "script.pt"))
    with pytest.raises(CheckpointError, match="TorchScript"):
        load(tmp_path / "script.pt")
    torch.export.save(torch.export.export(module, (torch.zeros(1, 2),)), tmp_path / "program.pt2")
    with pytest.raises(CheckpointError, match=r"torch\.export program"):
        load(tmp_path / "program.pt2")


def test_format_from_before_torch_1_6_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"before 1\.6"):
        load(path)


def test_missing_path_suggests_what_is_there(tmp_path: Path) -> None:
    saved(tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"did you mean model\.pt\?"):
        load(tmp_path / "modle.pt")
    with pytest.raises(CheckpointError, match="never from a hub"):
        load(tmp_path / "meta-llama" / "Llama-3")


def test_folders_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"folder without a config\.json: give a model file"):
        load(tmp_path)
    saved(tmp_path / "ckpt.pt")
    with pytest.raises(CheckpointError, match=r"did you mean .*ckpt\.pt\?"):
        load(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="merge it into the base model"):
        load(tmp_path)
    (tmp_path / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(CheckpointError, match="dcp_to_torch"):
        load(tmp_path)


def test_right_files_are_recognised_whatever_their_name(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    assert sniff(saved(tmp_path / "a.gguf")) is FileKind.TORCH
    save_file({"weight": torch.zeros(2)}, tmp_path / "b.pt")
    assert sniff(tmp_path / "b.pt") is FileKind.SAFETENSORS
    (tmp_path / "c.pt").write_bytes(b"GGUF" + bytes(20))
    assert sniff(tmp_path / "c.pt") is FileKind.GGUF
    with pytest.raises(CheckpointError, match="cannot be read as GGUF"):
        load(tmp_path / "c.pt")


class Table(nn.Module):
    """The module of the checkpoint that is damaged below."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(64))


def test_cut_file_is_never_loaded(tmp_path: Path) -> None:
    whole = saved(tmp_path / "whole.pt").read_bytes()
    cut = tmp_path / "cut.pt"
    for length in [*range(0, len(whole), 97), len(whole) - 1]:
        cut.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            load(cut, factory=Table)


def test_flipped_bit_is_noticed_or_harmless(tmp_path: Path) -> None:
    path = saved(tmp_path / "model.pt")
    whole, sha256 = path.read_bytes(), load(path, factory=Table).sha256
    draw = random.Random(0)
    outcomes = []
    for _ in range(150):
        broken = bytearray(whole)
        broken[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(broken)
        try:
            outcomes.append(load(path, factory=Table).sha256 == sha256)
        except StreamlensError:
            outcomes.append(True)
    assert all(outcomes)


def test_damaged_weights_are_found_by_their_checksum(tmp_path: Path) -> None:
    path = saved(tmp_path / "model.pt")
    content = path.read_bytes()
    place = content.index(torch.arange(64.0).numpy().tobytes())
    path.write_bytes(content[: place + 5] + b"\xff" + content[place + 6 :])
    with pytest.raises(CheckpointError, match="checksum of model/data/0 is wrong"):
        load(path, factory=Table)


def test_file_without_checksums_loads(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        path = saved(tmp_path / "model.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(load(path, factory=Table).module.get_parameter("weight"), torch.arange(64.0))


def test_damaged_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.arange(64.0)}, path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="damaged or cut short"):
        load(path, factory=Table)


def test_model_stays_when_its_file_goes(tmp_path: Path) -> None:
    path = saved(tmp_path / "model.pt")
    weight = load(path, factory=Table).module.get_parameter("weight")
    with path.open("r+b") as file:  # in place: a mapped file would change under the model
        file.write(bytes(path.stat().st_size))
    assert torch.equal(weight, torch.arange(64.0))


def test_old_torch_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"torch 2\.9\.1 .*install torch 2\.10"):
        require_safe_torch("2.9.1")
    require_safe_torch("3.0.0a0+git")


def test_pickle_is_refused_for_safety(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(b"\x80\x04}\x94.")
    with pytest.raises(UnsafeFileError, match="bare Python pickle") as caught:
        load(path, unsafe_pickle=True)
    assert caught.value.exit_code == 5
    shutil.copy(path, tmp_path / "model.safetensors")
    with pytest.raises(UnsafeFileError, match="bare Python pickle"):
        load(tmp_path / "model.safetensors")
