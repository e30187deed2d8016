"""What a path holds, told from its first bytes, and for everything that is no model what to do instead."""

from __future__ import annotations

import difflib
import zipfile
from enum import Enum
from pathlib import Path

from streamlens.errors import CheckpointError, UnsafeFileError

HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
"""The first bytes of every capture."""

_HEAD_BYTES = 512
_SAFETENSORS_HEADER_LIMIT = 100_000_000
_MODEL_SUFFIXES = {".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".gguf"}


class FileKind(Enum):
    """The kinds of path that a model can be loaded from."""

    TORCH = "torch.save"
    SAFETENSORS = "safetensors"
    GGUF = "GGUF"
    FOLDER = "Hugging Face folder"


_NOT_A_MODEL = {
    b"version https://git-lfs": "is a Git LFS pointer and not the weights: run `git lfs pull` in its folder",
    HDF5_MAGIC: "is an HDF5 file and not a model: `streamlens inspect` and `streamlens verify` read captures",
    b"\x93NUMPY": "is a numpy array and not a model: token ids are given with --tokens",
    b"\x1f\x8b": "is a compressed archive: unpack it and give what is inside",
    b"PK\x05\x06": "is an empty zip archive: save the model again",
    b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.": "has the format that torch wrote before 1.6: save it again with "
    "torch.save(torch.load(path, weights_only=True), new_path)",
}

_WEB_PAGE = (
    "is a web page, which is what a download gets without a login or with a wrong link: download the file itself"
)
_JSON = "is JSON text and not weights: give the folder that it lies in, or the weights together with --config"
_PICKLE = (
    "is a bare Python pickle, which can run any code when it is opened: it is refused; "
    "save the weights with torch.save(model.state_dict(), path)"
)
_UNKNOWN = "is no file that streamlens reads: give a torch .pt, .safetensors or .gguf file or a Hugging Face folder"
_CUT_SHORT = "is cut short or damaged ({}): copy or download it again"
_TORCHSCRIPT = (
    "is a TorchScript archive, whose inner modules cannot be watched: save the state_dict of the model it was made from"
)
_EXPORTED = (
    "is a torch.export program, which has no modules to watch: save the state_dict of the model it was made from"
)
_OTHER_ZIP = "is a zip archive without a torch checkpoint in it: unpack it and give what is inside"


def sniff(path: Path) -> FileKind:
    """Tell what a path holds.

    Raises:
        CheckpointError: it is missing, or nothing that a model can be loaded from; the message says what to do.
        UnsafeFileError: it is a bare pickle.
    """
    if path.is_dir():
        return _sniff_folder(path)
    if not path.exists():
        raise CheckpointError(_missing(path))
    if not path.is_file():
        raise CheckpointError(f"{path} is not a regular file: {_UNKNOWN.partition(': ')[2]}")
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    return _sniff_bytes(path, head)


def is_hdf5(path: Path) -> bool:
    """Tell by its first bytes whether a path is an HDF5 file, as every capture is."""
    if not path.is_file():
        return False
    with path.open("rb") as raw:
        return raw.read(len(HDF5_MAGIC)) == HDF5_MAGIC


def _sniff_bytes(path: Path, head: bytes) -> FileKind:
    if head.startswith(b"PK\x03\x04"):
        return _sniff_zip(path)
    if head.startswith(b"GGUF"):
        return FileKind.GGUF
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _SAFETENSORS_HEADER_LIMIT:
        return FileKind.SAFETENSORS
    if not head:
        raise CheckpointError(f"{path} is empty (0 bytes): save or download it again")
    for magic, advice in _NOT_A_MODEL.items():
        if head.startswith(magic):
            raise CheckpointError(f"{path} {advice}")
    text = head.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise CheckpointError(f"{path} {_WEB_PAGE}")
    if text.startswith((b"{", b"[")):
        raise CheckpointError(f"{path} {_JSON}")
    if head[0] == 0x80:  # the opcode that every pickle since protocol 2 begins with
        raise UnsafeFileError(f"{path} {_PICKLE}")
    raise CheckpointError(f"{path} {_UNKNOWN}")


def _sniff_zip(path: Path) -> FileKind:
    """A torch checkpoint is a zip archive, and so are three things that cannot be loaded."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [info.filename.partition("/")[2] or info.filename for info in archive.infolist()]
    except (zipfile.BadZipFile, OSError, NotImplementedError, ValueError) as error:
        raise CheckpointError(f"{path} {_CUT_SHORT.format(error)}") from None
    if "constants.pkl" in names:
        raise CheckpointError(f"{path} {_TORCHSCRIPT}")
    if "archive_format" in names or "serialized_exported_program.json" in names:
        raise CheckpointError(f"{path} {_EXPORTED}")
    if "data.pkl" not in names:
        raise CheckpointError(f"{path} {_OTHER_ZIP}")
    return FileKind.TORCH


def check_crc(path: Path) -> None:
    """Compare every record of a torch checkpoint with the checksum stored beside it, which torch itself never does.

    Raises:
        CheckpointError: a record is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            # torch can be told to leave the checksums out; they are all 0 then.
            damaged = archive.testzip() if any(info.CRC for info in archive.infolist()) else None
    except (zipfile.BadZipFile, OSError, NotImplementedError, EOFError, ValueError) as error:
        raise CheckpointError(f"{path} {_CUT_SHORT.format(error)}") from None
    if damaged is not None:
        raise CheckpointError(f"{path} {_CUT_SHORT.format(f'the checksum of {damaged} is wrong')}")


def _sniff_folder(path: Path) -> FileKind:
    if (path / "config.json").is_file():
        return FileKind.FOLDER
    names = sorted(entry.name for entry in path.iterdir())
    if any(name.endswith(".distcp") for name in names):
        raise CheckpointError(
            f"{path} is a distributed checkpoint: turn it into one file with "
            f"`python -m torch.distributed.checkpoint.format_utils dcp_to_torch {path} model.pt`"
        )
    if "adapter_config.json" in names:
        raise CheckpointError(f"{path} holds an adapter without its model: merge it into the base model and save that")
    models = [name for name in names if Path(name).suffix in _MODEL_SUFFIXES]
    hint = f"; did you mean {path / models[0]}?" if models else ": give a model file or a Hugging Face folder"
    raise CheckpointError(f"{path} is a folder without a config.json{hint}")


def _missing(path: Path) -> str:
    if not path.parent.is_dir():
        advice = f"there is no folder {path.parent} (models are read from this disk only, never from a hub)"
        return f"{path} does not exist: {advice}"
    near = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], cutoff=0.5)
    advice = f"did you mean {' or '.join(near)}?" if near else "models are read from this disk only, never from a hub"
    return f"{path} does not exist: {advice}"
