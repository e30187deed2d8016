"""After a capture, whatever needs the model finds it: the same weights in the same dtype, loaded as the user says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

import streamlens as sl
from fixtures import zoo
from streamlens.analyses.source import source_of
from streamlens.checkpoint.nanogpt import NanoGPT, NanoGPTConfig
from streamlens.cli.app import main
from streamlens.errors import CheckpointError, MissingDataError

SMALL = ["--window", "8", "--max-tokens", "32"]
Run = Callable[..., Result]
DTYPES: dict[str, Callable[[Any], Any]] = {
    "bfloat16": lambda name: torch.bfloat16,
    "mixed": lambda name: torch.float32 if "norm" in name else torch.bfloat16,
    "mixed, the first one odd": lambda name: torch.float32 if "embed" in name else torch.bfloat16,
    "float64": lambda name: torch.float64,
}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(main, list(arguments))


def llama_folder(folder: Path, kind: str = "bfloat16") -> Path:
    """A Hugging Face folder whose weights have other dtypes than the rotary frequencies, which no file holds."""
    from safetensors.torch import save_file

    module: Any = zoo.build("llama").module
    folder.mkdir()
    weights = {name: t.to(DTYPES[kind](name)).contiguous() for name, t in module.state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    config = {**module.config.to_diff_dict(), "architectures": [type(module).__name__]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def small_gpt() -> NanoGPT:
    torch.manual_seed(0)
    return NanoGPT(NanoGPTConfig(block_size=16, vocab_size=11, n_layer=2, n_head=2, n_embd=8))


def answered(result: Result) -> list[dict[str, Any]]:
    assert result.exit_code == 0, result.stderr
    rows: list[dict[str, Any]] = json.loads(result.stdout)["rows"]
    return rows


@pytest.mark.parametrize("command", [["ablate", "--drop-layer", "1"], ["gradient"], ["lens"]])
def test_a_folder_in_bfloat16_can_be_analysed_from_its_capture(run: Run, tmp_path: Path, command: list[str]) -> None:
    llama_folder(tmp_path / "llama")
    (row,) = answered(run("capture", "llama", *SMALL, "--out", "x.h5", "--json"))
    assert row["dtype"] == "bfloat16"
    stored = answered(run(command[0], "x.h5", *command[1:], "--json"))
    live = answered(run(command[0], "llama", *SMALL, *command[1:], "--json"))
    assert [r.keys() for r in stored] == [r.keys() for r in live]


@pytest.mark.parametrize("kind", DTYPES)
def test_weights_of_any_dtype_are_found_again(tmp_path: Path, kind: str) -> None:
    folder = llama_folder(tmp_path / "llama", kind)
    with sl.capture(folder, out=tmp_path / "x.h5", window=8, max_tokens=32, progress=False) as capture:
        assert source_of(capture).model.sha256 == capture.attrs["model_sha256"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_that_was_cast_when_it_was_captured_is_cast_again(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = llama_folder(tmp_path / "llama", "mixed")
    model = sl.load(folder, dtype=dtype)
    with sl.capture(model, out=tmp_path / "x.h5", window=8, max_tokens=32, progress=False) as capture:
        assert capture.attrs["dtype"] == str(dtype).removeprefix("torch.")
        found = source_of(capture).model
        assert found.sha256 == model.sha256
        assert {p.dtype for p in found.module.parameters()} == {dtype}


def test_another_model_in_its_place_is_told_once_it_is_loaded(tmp_path: Path) -> None:
    folder = llama_folder(tmp_path / "llama", "float64")
    with sl.capture(folder, out=tmp_path / "x.h5", window=8, max_tokens=32, progress=False) as capture:
        (folder / "model.safetensors").unlink()
        (folder / "config.json").unlink()
        folder.rmdir()
        llama_folder(folder, "bfloat16")
        with pytest.raises(MissingDataError, match="give the model of the capture, or capture this one anew"):
            _ = source_of(capture).model


def test_how_the_model_was_loaded_can_be_said_again(run: Run, tmp_path: Path) -> None:
    """A pickled module needs --unsafe-pickle for its capture, and so it does afterwards."""
    torch.save(small_gpt(), tmp_path / "whole.pt")
    assert run("capture", "whole.pt", *SMALL, "--unsafe-pickle").exit_code == 0
    refused = run("ablate", "--drop-layer", "0")
    assert refused.exit_code == 5
    assert "--unsafe-pickle" in refused.stderr
    assert answered(run("ablate", "--drop-layer", "0", "--unsafe-pickle", "--json"))


def test_the_config_of_bare_weights_can_be_given_again(run: Run, tmp_path: Path) -> None:
    torch.save(small_gpt().state_dict(), tmp_path / "weights.pt")
    config = {"block_size": 16, "vocab_size": 11, "n_layer": 2, "n_head": 2, "n_embd": 8, "bias": True}
    (tmp_path / "mine.json").write_text(json.dumps(config))
    assert run("capture", "weights.pt", *SMALL, "--config", "mine.json").exit_code == 0
    assert "--config" in run("gradient").stderr
    assert answered(run("gradient", "--config", "mine.json", "--json"))


def test_the_device_is_the_users(run: Run, tmp_path: Path) -> None:
    sl.pack(sl.load(small_gpt()), tmp_path / "model.pt")
    assert run("capture", "model.pt", *SMALL).exit_code == 0
    # No device of that name exists anywhere, so that only a command that hands it on can fail by it.
    failed = run("ablate", "--drop-layer", "0", "--device", "nowhere")
    assert failed.exit_code != 0
    assert "nowhere" in f"{failed.stderr}{failed.exception}"


def test_weights_in_a_factory_are_found_by_the_factory_alone(run: Run, tmp_path: Path) -> None:
    torch.save(small_gpt().state_dict(), tmp_path / "weights.pt")
    factory = ["--model", "tests.test_model_of_capture:small_gpt_of_other_weights"]
    assert run("capture", "weights.pt", *factory, *SMALL).exit_code == 0
    assert answered(run("ablate", "--drop-layer", "0", *factory, "--json"))


def small_gpt_of_other_weights() -> NanoGPT:
    torch.manual_seed(1)
    return NanoGPT(small_gpt().config)


@pytest.mark.parametrize("option", [["--batch-tokens", "64"], ["--ragged"], ["--dtype", "bf16"], ["--window", "8"]])
def test_what_a_capture_has_of_its_own_is_refused(run: Run, tmp_path: Path, option: list[str]) -> None:
    sl.pack(sl.load(small_gpt()), tmp_path / "model.pt")
    assert run("capture", "model.pt", *SMALL).exit_code == 0
    refused = run("gradient", *option)
    assert refused.exit_code == 2
    assert f"{option[0]} can only be given with a model" in " ".join(refused.stderr.split())


def test_a_relative_path_is_also_looked_up_beside_the_capture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    sl.pack(sl.load(small_gpt()), "model.pt")
    sl.capture("model.pt", out="x.h5", window=8, max_tokens=32, progress=False).close()
    monkeypatch.chdir(tmp_path)
    with sl.open("there/x.h5") as capture:
        assert source_of(capture).model.sha256 == capture.attrs["model_sha256"]
        # Another model of that name in this folder does not hide the right one.
        sl.pack(sl.load(small_gpt_of_other_weights()), "model.pt")
        assert source_of(capture).model.sha256 == capture.attrs["model_sha256"]


def test_a_capture_that_is_open_stays_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A notebook that changes its folder after opening: the path of the capture was relative, too."""
    for name in ("there", "elsewhere"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "there")
    sl.pack(sl.load(small_gpt()), "model.pt")
    with sl.capture("model.pt", out="x.h5", window=8, max_tokens=32, progress=False) as capture:
        monkeypatch.chdir(tmp_path / "elsewhere")
        assert source_of(capture).model.sha256 == capture.attrs["model_sha256"]


def test_a_model_that_moved_with_its_capture_is_found_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("models", "moved"):
        Path(name).mkdir()
    sl.pack(sl.load(small_gpt()), "models/model.pt")
    sl.capture("models/model.pt", out="x.h5", window=8, max_tokens=32, progress=False).close()
    for path in ("models/model.pt", "x.h5"):
        Path(path).rename(Path("moved") / Path(path).name)
    with sl.open("moved/x.h5") as capture:
        assert source_of(capture).model.sha256 == capture.attrs["model_sha256"]
        # The hash decides, wherever it lies.
        sl.pack(sl.load(small_gpt_of_other_weights()), "moved/model.pt")
        with pytest.raises(MissingDataError, match="give the model of the capture, or capture this one anew"):
            _ = source_of(capture).model


def test_what_cannot_be_loaded_does_not_hide_the_model_beside_the_capture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there").mkdir()
    monkeypatch.chdir("there")
    sl.pack(sl.load(small_gpt()), "model.pt")
    sl.capture("model.pt", out="x.h5", window=8, max_tokens=32, progress=False).close()
    monkeypatch.chdir(tmp_path)
    Path("model.pt").write_text("some notes of that name")
    with sl.open("there/x.h5") as capture:
        assert source_of(capture).model.sha256 == capture.attrs["model_sha256"]
        Path("there/model.pt").unlink()
        with pytest.raises(CheckpointError, match="no file that streamlens reads"):
            _ = source_of(capture).model


def test_what_only_bears_the_name_of_the_model_is_missing_data_with_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    model = sl.pack(sl.load(small_gpt()), tmp_path / "there" / "model.pt")
    monkeypatch.chdir(tmp_path)
    sl.capture(model, out="x.h5", window=8, max_tokens=32, progress=False).close()
    model.unlink()
    Path("model.pt").write_text("an unrelated file beside the capture")
    with sl.open("x.h5") as capture, pytest.raises(MissingDataError, match="not a file here") as raised:
        _ = source_of(capture).model
    assert "no model that can be loaded" in raised.value.__notes__[0]


def test_a_pickle_that_only_bears_the_name_never_runs(run: Run, tmp_path: Path) -> None:
    """--unsafe-pickle is for the file that was named, not for what lies beside a capture that somebody sent."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "sent").mkdir()
    sl.pack(sl.load(small_gpt()), tmp_path / "mine" / "model.pt")
    source, out = str(tmp_path / "mine" / "model.pt"), tmp_path / "sent" / "x.h5"
    sl.capture(source, out=out, window=8, max_tokens=32, progress=False).close()
    Path(source).unlink()
    sentinel = tmp_path / "ran"
    torch.save(Evil(str(sentinel)), tmp_path / "sent" / "model.pt")
    done = run("gradient", str(out), "--unsafe-pickle")
    assert done.exit_code == MissingDataError.exit_code
    assert not sentinel.exists()
    # The same file, named: that is what the option is for.
    run("gradient", str(out), "--unsafe-pickle", "--model-file", str(tmp_path / "sent" / "model.pt"))
    assert sentinel.exists()


class Evil:
    """What is unpickled writes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(self.path),)
