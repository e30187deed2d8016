"""Sublayers and states by name, in a live pass as in a file: the same labels, the same states, the same complaints."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import streamlens as sl
from fixtures import zoo
from streamlens.calling import eager_math, invoke
from streamlens.edits import run_between
from streamlens.errors import MissingDataError, UsageError
from streamlens.observation import Observation
from streamlens.proof import same_bits
from streamlens.reader.stream import StreamView
from tests.conftest import Case, case

Run = Callable[..., Tensor]

ROOT = Path(__file__).resolve().parent.parent


def ids_of(found: Case) -> Tensor:
    return found.inputs if isinstance(found.inputs, Tensor) else next(iter(found.inputs.values()))


def by_hand(model: Any, ids: Tensor, change: Callable[[str, Tensor], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """NanoGPT's forward, written out; every write and state passes `change` under its name and is kept."""
    kept: dict[str, Tensor] = {}

    def at(name: str, tensor: Tensor) -> Tensor:
        kept[name] = change(name, tensor)
        return kept[name]

    inner = model.transformer
    kept["embed"], kept["pos_embed"] = inner.wte(ids), inner.wpe(torch.arange(ids.shape[1]))
    x = kept["embed"] + kept["pos_embed"]
    for index, block in enumerate(inner.h):
        x = at(f"resid_pre.{index}", x)
        x = x + at(f"{index}_attn_out", block.attn(block.ln_1(x)))
        x = at(f"resid_mid.{index}", x)
        x = x + at(f"{index}_mlp_out", block.mlp(block.ln_2(x)))
    x = at(f"resid_post.{len(inner.h) - 1}", x)
    return model.lm_head(inner.ln_f(x)), kept


def unchanged(name: str, tensor: Tensor) -> Tensor:
    return tensor


NAMES = ["0_attn_out", "1_mlp_out", "resid_pre.1", "resid_mid.0", "resid_mid.1", "resid_post.2"]


@pytest.mark.parametrize("name", NAMES)
def test_an_edit_by_name_is_the_forward_written_by_hand(name: str) -> None:
    found = case("nanogpt")
    ids = ids_of(found)
    what = "writes" if name.endswith("out") else "states"

    def halved(tensor: Tensor) -> Tensor:
        return tensor * 0.5

    with torch.no_grad():
        expected, _ = by_hand(found.module, ids, lambda at, t: halved(t) if at == name else t)
        chosen: dict[str, Any] = {what: {name: halved}}
        with sl.edit(found.module, found.anatomy, **chosen):
            assert same_bits(invoke(found.module, found.inputs), expected)
        assert not same_bits(invoke(found.module, found.inputs), expected)


def test_what_was_seen_has_the_names_of_a_capture() -> None:
    found = case("nanogpt")
    with torch.no_grad():
        _, kept = by_hand(found.module, ids_of(found), unchanged)
        with sl.observe(found.module, found.anatomy) as seen:
            invoke(found.module, found.inputs)
    assert len([name for name in kept if name.endswith("out")]) == len(found.anatomy.stream().labels)
    for name, tensor in kept.items():
        if name.startswith("resid"):
            assert same_bits(seen.state(name), tensor)
        elif name.endswith("embed"):
            assert same_bits(seen.embed(name).expand_as(tensor), tensor)
        else:
            layer, kind, _ = name.split("_")
            assert same_bits(seen.write(name), tensor)
            assert same_bits(seen.read(name), kept[f"resid_{'pre' if kind == 'attn' else 'mid'}.{layer}"])
    assert same_bits(seen.state("resid_post.0"), kept["resid_pre.1"])
    assert same_bits(seen.state(-1), seen.state("resid_post.2"))
    assert same_bits(seen.write(2), seen.write("1_attn_out"))


@pytest.mark.parametrize("name", ["nanogpt", "gptj", "t5", "bert"])
def test_a_file_and_a_pass_mean_the_same_by_every_name(name: str, tmp_path: Path) -> None:
    """The rows of a file are the positions of the pass, one document after another."""
    found = case(name)
    with torch.no_grad(), eager_math(), sl.observe(found.module, found.anatomy, mixes=True) as seen:
        invoke(found.module, found.inputs)
    for stream in found.anatomy.streams:
        out = tmp_path / f"{stream.name}.h5"
        sl.capture(
            found.module, inputs=found.inputs, out=out, streams=[stream.name], heads=True, progress=False
        ).close()
        with sl.open(out) as capture:
            compare_by_every_name(seen, capture.stream(stream.name))


def compare_by_every_name(seen: Observation, view: StreamView) -> None:
    stream = view.anatomy
    names = {f"resid_{place}.{layer}" for place in ("pre", "mid", "post") for layer in range(stream.layers)}
    missing = set()
    for key in [*names, *range(len(stream.states))]:
        try:
            stored = view.state(key)
        except MissingDataError:
            missing.add(key)
            with pytest.raises(MissingDataError, match=r"near names: resid_"):
                seen.state(key, stream.name)
            continue
        assert same_bits(seen.state(key, stream.name).reshape_as(stored), stored)
    parallel = len(stream.steps) == stream.layers
    assert missing == ({f"resid_mid.{layer}" for layer in range(stream.layers)} if parallel else set())
    for key in [*stream.labels, *range(len(stream.labels)), -1]:
        assert same_bits(seen.write(key, stream.name).reshape_as(view.final), view.write(key))
        assert same_bits(seen.read(key, stream.name).reshape_as(view.final), view.read(key))
    mixes = [s.label for s in stream.sublayers if s.value_mix is not None]
    assert mixes
    for label in mixes:
        assert same_bits(seen.value_mix(label, stream.name).flatten(0, -2), view.value_mix(label))


def test_a_run_from_a_name_is_the_run_from_its_index() -> None:
    found = case("gpt2")
    args = (found.module, found.anatomy)
    with torch.no_grad(), eager_math():
        with sl.observe(*args) as seen:
            plain = invoke(found.module, found.inputs)
        for layer in range(3):
            for index, place in enumerate(("pre", "mid", "post")):
                name = f"resid_{place}.{layer}"
                state = seen.state(name) * 1.5
                assert same_bits(seen.state(name), seen.states["main"][2 * layer + index])
                expected = sl.run_from(*args, 2 * layer + index, state, found.inputs)
                assert same_bits(sl.run_from(*args, name, state, found.inputs), expected)
                assert not same_bits(expected, plain)
        middle = run_between(*args, "resid_pre.0", seen.state(0), "resid_mid.2", found.inputs)
        assert same_bits(middle, seen.state(5))


def test_of_several_streams_the_head_reads_the_default() -> None:
    """Labels repeat between the streams of an encoder-decoder: a zeroed write tells which one was meant."""
    found = case("t5")
    assert [s.name for s in found.anatomy.streams] == ["encoder", "decoder"]
    zeroed = {}
    for stream in (None, "encoder", "decoder"):
        zeroing = sl.edit(found.module, found.anatomy, writes={"0_mlp_out": torch.zeros_like}, stream=stream)
        # The edit inside: what is looked at outside of it is what takes the place of the write.
        with torch.no_grad(), sl.observe(found.module, found.anatomy) as seen, zeroing:
            invoke(found.module, found.inputs)
        zeroed[stream] = {s.name for s in found.anatomy.streams if not seen.write("0_mlp_out", s.name).any()}
        assert same_bits(seen.write("0_mlp_out"), seen.write("0_mlp_out", "decoder"))
    assert zeroed == {None: {"decoder"}, "encoder": {"encoder"}, "decoder": {"decoder"}}
    with pytest.raises(MissingDataError, match="no stream 'main'; this model has encoder, decoder"):
        sl.edit(found.module, found.anatomy, writes={0: torch.zeros_like}, stream="main")


COMPLAINTS = [
    ({"writes": {"1_mpl_out": torch.clone}}, r"no sublayer '1_mpl_out'; near names: 1_mlp_out"),
    ({"writes": {"?": torch.clone}}, r"no sublayer '\?'; near names: 0_attn_out, 0_mlp_out, 1_attn_out"),
    ({"states": {"resid_mid.9": torch.clone}}, r"no state 'resid_mid\.9'; near names: resid_mid\.\d"),
    ({"states": {"x": torch.clone}}, r"no state 'x'; near names: resid_pre\.0, "),
    ({"states": {7: torch.clone}}, "has states 0 to 6, not 7"),
    ({"writes": {-7: torch.clone}}, "has sublayers 0 to 5, not -7"),
]


@pytest.mark.parametrize(("changes", "complaint"), COMPLAINTS)
def test_an_unknown_name_lists_near_ones(changes: dict[str, Any], complaint: str) -> None:
    found = case("gpt2")
    with pytest.raises(MissingDataError, match=complaint):
        sl.edit(found.module, found.anatomy, **changes)


def test_two_names_of_one_sublayer_are_refused() -> None:
    """Else one of the two changes would be lost in silence."""
    found = case("gpt2")
    with pytest.raises(UsageError, match="'1_mlp_out' and 3 are the same one"):
        sl.edit(found.module, found.anatomy, writes={"1_mlp_out": torch.zeros_like, 3: torch.clone})
    with pytest.raises(UsageError, match="6 and -1 are the same one"):
        sl.edit(found.module, found.anatomy, states={6: torch.zeros_like, -1: torch.clone})


def test_what_was_not_seen_is_said_to_be_missing() -> None:
    found = case("gpt2")
    with sl.observe(found.module, found.anatomy) as seen:
        assert repr(seen) == "<observation of nothing yet>"
        with pytest.raises(MissingDataError, match="no forward pass was seen in stream 'main'"):
            seen.write("0_mlp_out")
        invoke(found.module, found.inputs)
    assert repr(seen) == "<observation of main: 6 writes, 7 states>"
    with pytest.raises(MissingDataError, match="mixes=True"):
        seen.value_mix("0_attn_out")
    with pytest.raises(MissingDataError, match="has the embedding parts embed, pos_embed, not None"):
        seen.embed()


def test_a_loaded_model_serves_as_well_as_its_module(tmp_path: Path) -> None:
    model = sl.load(zoo.build("nanogpt").module)
    ids = torch.arange(9)[None] % 7
    anatomy = sl.discover(model, ids)
    assert anatomy == sl.discover(model.module, ids)
    with torch.no_grad():
        with sl.observe(model, anatomy) as seen:
            plain, _ = model.module(ids)
        with sl.observe(model.module, anatomy) as again:
            model.module(ids)
        for name in anatomy.stream().labels:
            assert same_bits(seen.write(name), again.write(name))
        outputs = []
        for which in (model, model.module):
            with sl.edit(which, anatomy, writes={"0_mlp_out": torch.zeros_like}):
                outputs.append(model.module(ids)[0])
        assert same_bits(*outputs)
        assert not same_bits(outputs[0], plain)
        assert same_bits(sl.run_from(model, anatomy, "resid_mid.0", seen.state("resid_mid.0"), ids), plain)


CALLS = ["discover(x, 0)", "edit(x, a, writes={0: abs})", "observe(x, a).__enter__()", "run_from(x, a, 0, None, 0)"]


def test_what_is_no_model_is_told_to_be_loaded(tmp_path: Path) -> None:
    """In a process of its own: the tests check types before the library can say what would be right."""
    (tmp_path / "a.json").write_text(case("gpt2").anatomy.to_json())
    calls = "".join(f"try: sl.{call}\nexcept sl_errors.UsageError as e: print(e)\n" for call in CALLS)
    script = (
        "import pathlib, streamlens as sl, streamlens.errors as sl_errors\n"
        f"x, a = 'model.pt', sl.Anatomy.from_json(pathlib.Path('a.json').read_text())\n{calls}"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ["give a module or a loaded model (sl.load), not str 'model.pt'"] * len(CALLS)


@pytest.mark.parametrize("key", [0.0, None, True])
def test_what_is_neither_label_nor_index_names_nothing(key: Any) -> None:
    found = case("gpt2")
    with pytest.raises(UsageError, match="by its label or its index"):
        sl.edit(found.module, found.anatomy, writes={key: torch.zeros_like})
    with pytest.raises(UsageError, match="by its label or its index"):
        sl.edit(found.module, found.anatomy, states={key: torch.zeros_like})


def test_a_change_is_a_function_that_keeps_the_shape() -> None:
    """A smaller tensor would be broadcast, and the numbers look like an answer."""
    found = case("gpt2")
    # The types of arguments are checked in the tests alone; a user's mistake comes as far as this.
    script = (
        "import streamlens as sl; from fixtures import zoo; s = zoo.build('gpt2')\n"
        "sl.edit(s.module, sl.discover(s.module, s.inputs), writes={3: 0})"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert "UsageError: 3 is changed by a function of its tensor, such as torch.zeros_like, not by 0" in done.stderr
    for change in (lambda w: w[:, :1], lambda w: w[..., :1], lambda w: w[:1, :1], lambda w: None):
        with (
            torch.no_grad(),
            pytest.raises(UsageError, match="keep the shape"),
            sl.edit(found.module, found.anatomy, writes={3: change}),  # type: ignore[dict-item]
        ):
            invoke(found.module, found.inputs)
