"""A caller's own module is as it was after all that runs on it, and in eval mode and frozen meanwhile."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import streamlens as sl
from streamlens.analyses.source import source_of
from streamlens.cli.app import main
from streamlens.errors import MissingDataError, UsageError
from streamlens.reader.opening import Capture
from streamlens.rest import at_rest

IDS = torch.randint(0, 40, (8, 16), generator=torch.Generator().manual_seed(0))

DOORS: dict[str, Callable[..., Any]] = {
    "contribution_norms": lambda origin, **given: sl.contribution_norms(origin, heads=True, logits=True, **given),
    "logit_lens": sl.logit_lens,
    "token_tracks": lambda origin, progress, **given: sl.token_tracks(origin, positions=range(4), **given),
    "write_lens": lambda origin, progress, **given: sl.write_lens(origin, positions=range(4), **given),
    "train_lens": lambda origin, **given: sl.train_lens(origin, kind="kl", **given),
    "gradient_flow": sl.gradient_flow,
    "path_spectrum": sl.path_spectrum,
    "positional_persistence": sl.positional_persistence,
    "position_probes": sl.position_probes,
    "position_lesion": sl.position_lesion,
    "ablate": lambda origin, **given: sl.ablate(origin, mode="mean", **given),
    "ablate_blocks": sl.ablate_blocks,
    "ablate_pairs": sl.ablate_pairs,
    "drop_greedily": sl.drop_greedily,
    "effects": sl.effects,
    "swap_neighbours": sl.swap_neighbours,
}


def in_training(seed: int = 0) -> Any:
    """GPT-2 in the middle of training: one of its parts is in eval mode, another frozen."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    small: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 40, "n_positions": 24}
    module: Any = GPT2LMHeadModel(GPT2Config(**small, bos_token_id=0, eos_token_id=0, embd_pdrop=0.2)).train()
    module.transformer.h[1].eval()
    module.transformer.wpe.weight.requires_grad_(False)
    return module


def state_of(module: nn.Module) -> tuple[list[bool], list[bool]]:
    """The flag of every submodule and of every parameter."""
    return [m.training for m in module.modules()], [p.requires_grad for p in module.parameters()]


@contextmanager
def left_alone(module: nn.Module) -> Iterator[None]:
    """Demand that it is as it was afterwards, and that it was at rest whenever it ran."""
    before, met = state_of(module), set[bool]()
    handle = module.register_forward_pre_hook(lambda m, args: met.update(*state_of(m)))
    try:
        yield
    finally:
        handle.remove()
        assert state_of(module) == before
    assert met <= {False}


@cache
def eval_twin() -> Any:
    return in_training().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Capture]:
    path = tmp_path_factory.mktemp("left") / "x.h5"
    with sl.capture(eval_twin(), tokens=IDS, out=path, heads=True, progress=False) as capture:
        yield capture


def test_every_analysis_is_tried() -> None:
    takes = {n for n in sl.__all__ if [*_parameters(getattr(sl, n))][:1] == ["origin"]}
    assert takes - {"report"} == set(DOORS)


def _parameters(found: Any) -> Any:
    return inspect.signature(found).parameters if inspect.isfunction(found) else {}


@pytest.mark.parametrize("name", DOORS)
def test_an_analysis_leaves_the_module_alone(name: str, captured: Capture) -> None:
    module = in_training()
    with left_alone(module):
        live = DOORS[name](module, tokens=IDS, progress=False)
    loaded = sl.load(module)
    with left_alone(module):
        DOORS[name](loaded, tokens=IDS, progress=False)
    with left_alone(module):
        DOORS[name](captured, model=module, progress=False)
    module(IDS, labels=IDS).loss.backward()
    assert module.transformer.wte.weight.grad is not None
    # What it says is what it says of a module that was in eval mode all along.
    still = DOORS[name](eval_twin(), tokens=IDS, progress=False)
    if hasattr(live, "rows"):
        assert repr(_rows(live)) == repr(_rows(still))


def _rows(answer: Any) -> Any:
    return answer.rows() if callable(answer.rows) else answer.rows


def test_also_where_an_analysis_fails(captured: Capture) -> None:
    module, other = in_training(), in_training(1)
    with left_alone(module), pytest.raises(UsageError, match="no mode"):
        sl.ablate(module, mode="none", tokens=IDS, progress=False)  # type: ignore[arg-type]
    with left_alone(other), pytest.raises(MissingDataError, match="give the model of the capture"):
        sl.ablate(captured, model=other, progress=False)

    def burst(*_: Any) -> None:
        raise RuntimeError("in the middle of a pass")

    handle = module.transformer.h[1].mlp.register_forward_hook(burst)
    before = state_of(module)
    with pytest.raises(RuntimeError, match="in the middle"):
        sl.logit_lens(module, tokens=IDS, progress=False)
    handle.remove()
    assert state_of(module) == before


def test_load_and_discover_and_a_report_leave_it_alone(captured: Capture, tmp_path: Path) -> None:
    module = in_training()
    with left_alone(module):
        sl.load(module)
    with left_alone(module):
        anatomy = sl.discover(module, IDS)
    assert [p.label for p in anatomy.stream().parts] == [p.label for p in captured.anatomy.stream().parts]
    assert all(p.point is not None for p in anatomy.stream().parts)
    with left_alone(module):
        sl.report(captured, tmp_path / "x.html", model=module, sections=["lens"], tokens=32, progress=False)


def test_a_live_source_rests_while_it_is_iterated_over() -> None:
    module = in_training()
    with left_alone(module):
        source = source_of(module, tokens=IDS)
        blocks = [block.states[-1] for block in source.blocks()]
    still = [block.states[-1] for block in source_of(eval_twin(), tokens=IDS).blocks()]
    assert torch.equal(torch.cat(blocks), torch.cat(still))
    assert not blocks[0].requires_grad


def test_what_eval_and_train_do_besides_is_undone() -> None:
    """Adapters that are merged into the weights in eval mode are taken out of them again."""

    class Merging(nn.Linear):
        merged = False

        def train(self, mode: bool = True) -> Merging:
            self.merged = not mode
            return super().train(mode)

    module = nn.Sequential(Merging(2, 2), nn.Linear(2, 2).eval())
    with at_rest(module), at_rest(module):
        assert module[0].merged
    assert not module[0].merged
    assert [m.training for m in module] == [True, False]


def test_a_module_is_the_model_of_a_capture(captured: Capture) -> None:
    found = sl.logit_lens(captured, model=eval_twin(), progress=False)
    assert repr(found.rows) == repr(sl.logit_lens(captured, model=sl.load(eval_twin()), progress=False).rows)
    with pytest.raises(UsageError, match="load"):
        sl.logit_lens(captured, model="model.pt", progress=False)  # type: ignore[arg-type]


# Edits and observations, in which the caller's own pass decides the mode


def test_watching_a_module_that_drops_at_random_is_refused() -> None:
    module = in_training()
    anatomy = sl.discover(module, IDS)
    state = torch.zeros(8, 16, 16)
    with pytest.raises(UsageError, match=r"in transformer\.drop: call \.eval\(\) first"), sl.observe(module, anatomy):
        pass
    with pytest.raises(UsageError, match=r"call \.eval"):
        sl.edit(module, anatomy, writes={0: torch.zeros_like})
    for start in (0, 2):
        with pytest.raises(UsageError, match=r"call \.eval"):
            sl.run_from(module, anatomy, start, state, IDS)


def test_a_module_in_train_mode_without_dropout_is_watched() -> None:
    module = in_training()
    anatomy = sl.discover(module, IDS)
    for found in module.modules():
        if isinstance(found, nn.Dropout):
            found.p = 0.0
    with sl.observe(module, anatomy) as seen:
        output = module(IDS).logits
    assert torch.allclose(output, eval_twin()(IDS).logits)
    assert torch.equal(
        torch.stack([seen.embed(p.label).expand(8, 16, 16) for p in anatomy.stream().parts]).sum(0), seen.state(0)
    )
    assert module.training


def test_dropout_without_a_module_of_its_own_is_met() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).train()
    x = torch.randn(2, 5, 8)
    anatomy = sl.discover(model, x)
    for found in model.modules():
        if isinstance(found, nn.Dropout):
            found.eval()
    with pytest.raises(UsageError, match="self_attn"):
        sl.edit(model, anatomy)
    with pytest.raises(UsageError, match="self_attn"):
        sl.run_from(model, anatomy, 0, x, x)  # the state is the model's own input: nothing is edited


# What is the caller's is not converted


@pytest.mark.parametrize("given", [{"device": "meta"}, {"device": "cpu"}, {"dtype": "bfloat16"}], ids=str)
def test_a_live_module_is_not_converted(given: dict[str, Any]) -> None:
    module = in_training()
    for source in (module, sl.load(module)):
        with pytest.raises(UsageError, match="convert it yourself"):
            sl.load(source, **given)
    assert {p.dtype for p in module.parameters()} == {torch.float32}


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "cpu:banana", "meta"])
def test_a_device_that_is_not_there(device: str) -> None:
    with pytest.raises(UsageError, match=rf"device '{device}' cannot be used: PyTorch .* finds cpu"):
        sl.load(factory=eval_twin, device=device)


def test_a_command_says_in_one_line_that_a_device_is_not_there(captured: Capture) -> None:
    for command in (["capture", "--model", "zlib:crc32"], ["lens", str(captured.path), "--model", "zlib:crc32"]):
        result = CliRunner().invoke(main, [*command, "--device", "cuda:99"])
        assert result.exit_code == 2, result.output
        assert "device 'cuda:99' cannot be used" in " ".join(result.stderr.split())
        assert "Traceback" not in result.output


# Names


def test_a_live_module_is_called_by_its_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with sl.capture(in_training(), tokens=IDS, progress=False) as capture:
        assert capture.path.name == "GPT2LMHeadModel.h5"
        assert source_of(capture).description.startswith("GPT2LMHeadModel, ")
    assert source_of(in_training(), tokens=IDS).description.startswith("GPT2LMHeadModel, ")


@pytest.mark.parametrize(
    ("folder", "name"), [("Qwen2.5-0.5B", "Qwen2.5-0.5B"), ("Qwen2.5-0.5B/model", "Qwen2.5-0.5B"), ("model", "model")]
)
def test_a_folder_gives_its_name_to_the_file(
    folder: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(folder).mkdir(parents=True)
    in_training().save_pretrained(folder)
    with sl.capture(folder, tokens=IDS, progress=False) as capture:
        assert capture.path.name == f"{name}.h5"
        assert source_of(capture).description.startswith(f"{name}, ")
