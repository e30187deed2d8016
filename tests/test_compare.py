"""Two captures side by side: means, differences, intervals and distances against plain loops over the files."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from numpy.typing import NDArray

import streamlens as sl
from fixtures import witnesses
from streamlens.analyses.compare.aligning import align, beside
from streamlens.analyses.compare.answer import Comparison
from streamlens.analyses.figures import save_figure
from streamlens.analyses.norms.measures import Contribution
from streamlens.analyses.statistics import times_drawn
from streamlens.cli.app import main
from streamlens.errors import MissingDataError, UsageError
from tests.conftest import case

Array = NDArray[np.float64]
MIXED = [f"{word} and then the rest of text number {n}, {word * 3}." for n, word in enumerate(["one", "two"] * 6)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Capture a witness, once for the same arguments."""
    folder, known = tmp_path_factory.mktemp("compare"), dict[str, Path]()

    def make(name: str, **options: Any) -> Path:
        key = f"{name} {options}"
        if key not in known:
            path = folder / f"{len(known)}.h5"
            sl.capture(
                witnesses.model(name), out=path, progress=False, **{"max_tokens": 1024, "window": 128, **options}
            )
            known[key] = path
        return known[key]

    return make


def compared(first: Path, second: Path, **options: Any) -> Comparison:
    return sl.compare(first, second, progress=False, **options)


def stored(path: Path, label: str) -> tuple[Array, Array, Array]:
    """What a sublayer of a full capture read and wrote, and the window of each token, by h5py alone."""
    with h5py.File(path) as file:
        names = [name.decode() for name in file["/streams/main/sublayers"]["label"]]
        read, write = (
            file[f"/streams/main/{kind}"][names.index(label)].astype(np.float64) for kind in ("read", "write")
        )
        position = file["/tokens/position"][:]
    window, at = np.zeros(len(position)), 0
    for token, place in enumerate(position):
        at = token if place == 0 else at
        window[token] = at
    return read, write, window


def plain_drawn(values: Array, unit: Array, seed: int) -> tuple[float, Array]:
    """The mean over tokens, and the mean in each draw, unit by unit."""
    total, size = np.zeros(1000), np.zeros(1000)
    for one in np.unique(unit):
        times = times_drawn(seed, int(one)).astype(float)
        total += times * values[unit == one].sum()
        size += times * (unit == one).sum()
    return float(values.mean()), np.divide(total, size, out=np.full(1000, np.nan), where=size > 0)


@pytest.mark.parametrize("label", ["0_attn_out", "4_mlp_out", "7_attn_out"])
def test_means_differences_and_intervals_equal_plain_loops(made: Callable[..., Path], label: str) -> None:
    paths = made("pre_norm"), made("rope")
    found = compared(*paths)
    drawn, means = [], []
    for path in paths:
        read, write, window = stored(path, label)
        later = np.isin(np.arange(len(window)), window, invert=True)
        sizes = np.linalg.norm(write, axis=-1) / np.linalg.norm(read, axis=-1)
        mean, draws = plain_drawn(sizes[later], window[later], seed=0)
        means.append(mean)
        drawn.append(draws)
    low, high = np.nanquantile(drawn[1] - drawn[0], [0.025, 0.975])
    row = found.at(label, "relative_write")
    assert found.over == "windows"
    assert row["first"] == pytest.approx(means[0], rel=1e-5)
    assert row["second"] == pytest.approx(means[1], rel=1e-5)
    assert row["difference"] == pytest.approx(means[1] - means[0], rel=1e-4, abs=1e-6)
    assert (row["low"], row["high"]) == pytest.approx((low, high), rel=1e-4, abs=1e-6)


def test_the_loss_is_that_of_the_models(made: Callable[..., Path]) -> None:
    names = "pre_norm", "post_norm"
    found = compared(*map(made, names))
    losses = []
    for name in names:
        capture = sl.open(made(name))
        ids, position = capture.tokens.id, capture.tokens.position
        windows = torch.tensor_split(ids, torch.nonzero(position == 0)[1:, 0].tolist())
        model = witnesses.model(name).module
        with torch.no_grad():
            each = [
                torch.nn.functional.cross_entropy(model(w[None, :-1])[0], w[1:], reduction="none")[1:] for w in windows
            ]
        losses.append(float(torch.cat(each).double().mean()))
    assert found.loss is not None
    assert [found.loss["first"], found.loss["second"]] == pytest.approx(losses, rel=1e-5)
    assert found.loss["difference"] == pytest.approx(losses[1] - losses[0], abs=1e-5)
    assert found.loss["low"] < found.loss["difference"] < found.loss["high"]


def test_a_capture_against_itself_differs_in_nothing(made: Callable[..., Path]) -> None:
    found = compared(made("post_norm"), made("post_norm", batch_tokens=256))
    assert found.paired
    for array in (found.measures.difference, found.measures.low, found.measures.high):
        assert np.nanmax(np.abs(array)) == 0.0
    assert found.similarity is not None
    assert found.moved is not None
    assert found.similarity.cka == pytest.approx(1.0, abs=1e-9)
    assert found.moved.mean[:, 0] == pytest.approx(0.0)
    assert found.moved.mean[:, 1] == pytest.approx(1.0, abs=1e-6)
    assert found.clear() == (0, 16)


def test_a_write_twice_as_large_is_found_where_it_is(tmp_path: Path) -> None:
    louder = witnesses.model("pre_norm")
    with torch.no_grad():
        for parameter in louder.module.get_submodule("blocks.3.mlp.down").parameters():
            parameter.mul_(2)
    for name, model in (("base", witnesses.model("pre_norm")), ("louder", louder)):
        sl.capture(model, out=tmp_path / f"{name}.h5", max_tokens=512, progress=False)
    found = compared(tmp_path / "base.h5", tmp_path / "louder.h5")
    row = found.at("3_mlp_out", "relative_write")
    assert row["second"] == pytest.approx(2 * row["first"], rel=1e-5)
    before = [r for r in found.rows_of("relative_write") if r["layer"] in (0, 1, 2) or r["label"] == "3_attn_out"]
    assert all(r["difference"] == r["low"] == r["high"] == 0 for r in before)
    assert found.moved is not None
    moved = {(r["label"], r["kind"]): r for r in found.moved.rows()}
    assert moved["3_mlp_out", "mlp"]["distance"] == pytest.approx(1.0, rel=1e-5)  # |2 u - u| / |u|
    assert moved["3_mlp_out", "mlp"]["cosine"] == pytest.approx(1.0, rel=1e-5)
    assert moved["3_attn_out", "state"]["distance"] == 0
    assert moved["3_mlp_out", "state"]["distance"] > 0


def test_distances_equal_a_plain_loop_however_blocks_are_cut(made: Callable[..., Path]) -> None:
    paths = made("pre_norm", batch_tokens=384), made("post_norm", batch_tokens=256)
    found = compared(*paths).moved
    assert found is not None
    captures = [sl.open(path) for path in paths]
    position = captures[0].tokens.position.numpy()
    vectors = [(kind, at, label) for label, kind, at in zip(found.labels, found.kinds, found.at, strict=True)]
    for row, (kind, at, label) in enumerate(vectors):
        u, v = ((c.state(at) if kind == "state" else c.write(label)).double().numpy()[position > 0] for c in captures)
        distance = np.mean([np.linalg.norm(b - a) / np.linalg.norm(a) for a, b in zip(u, v, strict=True)])
        cosine = np.mean([a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(u, v, strict=True)])
        assert found.mean[row] == pytest.approx([distance, cosine], rel=1e-5, abs=1e-6)


class TestPairing:
    """What can be paired is, and nothing else."""

    def test_the_same_text_in_other_windows_is_not_the_same_tokens(self, made: Callable[..., Path]) -> None:
        short, long = (made("pre_norm", text=MIXED, window=n) for n in (16, 32))
        found = compared(short, long)
        assert (found.paired, found.over, found.similarity, found.moved) == (False, "documents", None, None)
        assert compared(short, short).over == "documents"

    def test_other_texts_are_drawn_apart(self, made: Callable[..., Path]) -> None:
        paths = made("pre_norm"), made("pre_norm", text=["something else entirely, " * 60], window=32)
        found = compared(*paths)
        drawn = []
        for seed, path in enumerate(paths):
            read, write, window = stored(path, "2_mlp_out")
            later = np.isin(np.arange(len(window)), window, invert=True)
            sizes = np.linalg.norm(write, axis=-1) / np.linalg.norm(read, axis=-1)
            drawn.append(plain_drawn(sizes[later], window[later], seed)[1])
        row = found.at("2_mlp_out", "relative_write")
        ends = np.nanquantile(drawn[1] - drawn[0], [0.025, 0.975])
        assert not found.paired
        assert (row["low"], row["high"]) == pytest.approx(tuple(ends), rel=1e-4, abs=1e-6)
        assert "did not see the same tokens" in found.says[1]

    def test_pairing_narrows_the_interval(self, made: Callable[..., Path]) -> None:
        found = compared(made("pre_norm"), made("post_norm"))
        assert found.loss is not None
        loss = {name: sl.open(made(name)).output for name in ("pre_norm", "post_norm")}
        alone = np.nanstd((loss["pre_norm"]["lse"] - loss["pre_norm"]["target_logit"]).numpy())
        count = sl.open(made("pre_norm")).n_tokens
        assert found.loss["high"] - found.loss["low"] < 2 * 1.96 * alone * (2 / count) ** 0.5


class TestAlignment:
    """Rows that belong together stand together."""

    def test_of_layers_at_the_same_relative_depth(self) -> None:
        assert [beside(layer, (12, 12)) for layer in range(12)] == list(range(12))
        assert [beside(layer, (6, 3)) for layer in range(6)] == [0, 0, 1, 1, 2, 2]
        assert [beside(layer, (2, 30)) for layer in range(2)] == [7, 22]

    def test_by_kind_and_order_within_a_layer(self) -> None:
        first = [Contribution(f"{layer}_{n}", "mlp", layer) for layer in range(2) for n in "ab"]
        second = [Contribution("e", "embed", None), *(Contribution(f"{n}", "mlp", 0) for n in "xy")]
        found = align(first, second, (2, 1))
        assert found.pairs == ((0, 1), (1, 2), (2, 1), (3, 2))
        assert found.says.endswith("0 and 1 rows")

    def test_of_two_architectures(self, tmp_path: Path) -> None:
        for name in ("gpt2", "llama", "mamba"):
            sl.capture(case(name).module, inputs=case("gpt2").inputs, out=tmp_path / f"{name}.h5", progress=False)
        found = compared(tmp_path / "gpt2.h5", tmp_path / "llama.h5")
        kinds = {own.kind for own, _ in found.pairs}
        assert {"attn", "mlp", "layer"} <= kinds
        assert all(own.kind == other.kind and own.layer == other.layer for own, other in found.pairs)
        mixer = compared(tmp_path / "gpt2.h5", tmp_path / "mamba.h5")
        assert {own.kind for own, _ in mixer.pairs} <= {"layer", "embed"}
        assert mixer.paired
        assert mixer.moved is None  # the same tokens, but vectors of other sublayers
        assert mixer.similarity is not None


def test_an_interval_without_zero_is_counted_on_either_side(made: Callable[..., Path]) -> None:
    found = compared(made("pre_norm"), made("post_norm"), measure="cosine")
    rows = [row for row in found.rows_of("cosine") if row["kind"] in ("attn", "mlp")]
    signs = [row["low"] > 0 for row in rows], [row["high"] < 0 for row in rows]
    assert any(signs[0])
    assert any(signs[1])
    assert found.clear() == (sum(signs[0]) + sum(signs[1]), 16)


class TestLikeness:
    """States as wholes."""

    def test_no_token_at_position_0_is_among_those_compared(self, made: Callable[..., Path]) -> None:
        paths = made("pre_norm"), made("post_norm")
        found = compared(*paths, sample=1016).similarity  # 8 windows of 127 later positions: all of them
        assert found is not None
        captures = [sl.open(path) for path in paths]
        later = captures[0].tokens.position > 0
        for (i, j), cka in zip(found.states, found.cka, strict=True):
            tables = [c.state(k)[later].double() for c, k in zip(captures, (i, j), strict=True)]
            grams = [plain_u_centred(table @ table.T) for table in tables]
            products = [float((a * b).sum()) for a, b in ((grams[0], grams[1]), (grams[0],) * 2, (grams[1],) * 2)]
            assert cka == pytest.approx(products[0] / (products[1] * products[2]) ** 0.5, abs=1e-5)

    def test_states_of_another_depth_stand_at_the_same_depth(self, tmp_path: Path) -> None:
        for layers in (2, 4):
            layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
            module = torch.nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).eval()
            wrapped = torch.nn.Sequential(torch.nn.Embedding(11, 8), module).eval()
            ids = torch.randint(0, 11, (4, 6), generator=torch.Generator().manual_seed(0))
            sl.capture(wrapped, tokens=ids, window=None, out=tmp_path / f"{layers}.h5", progress=False)
        for first, second, states in (
            (2, 4, ((0, 0), (2, 4), (4, 8))),
            (4, 2, ((0, 0), (2, 0), (4, 2), (6, 2), (8, 4))),
        ):
            found = compared(tmp_path / f"{first}.h5", tmp_path / f"{second}.h5").similarity
            assert found is not None
            assert found.states == states


def plain_u_centred(gram: torch.Tensor) -> torch.Tensor:
    """Song et al. 2012, equation by equation."""
    n = len(gram)
    gram = gram.clone()
    gram.fill_diagonal_(0)
    rows, total = gram.sum(0) / (n - 2), gram.sum() / ((n - 1) * (n - 2))
    return (gram - rows[:, None] - rows[None] + total).fill_diagonal_(0)


def test_small_differences_in_float64_are_seen(tmp_path: Path) -> None:
    found = case("user_post_norm", torch.float64)
    module = copy.deepcopy(found.module)
    for name, factor in (("base", 1.0), ("moved", 1 + 1e-9)):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(factor)
        sl.capture(module, inputs=found.inputs, out=tmp_path / f"{name}.h5", progress=False)
    moved = compared(tmp_path / "base.h5", tmp_path / "moved.h5").moved
    assert moved is not None
    assert moved.mean[0, 0] == pytest.approx(1e-9, rel=1e-3)


def test_other_inputs_of_the_encoder_are_other_tokens(tmp_path: Path) -> None:
    found = case("t5")
    inputs: dict[str, Any] = dict(found.inputs)
    other = {**inputs, "input_ids": inputs["input_ids"].flip(1)}
    for name, given in (("base", inputs), ("same", inputs), ("other", other)):
        sl.capture(
            found.module, inputs=given, out=tmp_path / f"{name}.h5", streams=["decoder"], window=None, progress=False
        )
    assert compared(tmp_path / "base.h5", tmp_path / "same.h5").paired
    assert not compared(tmp_path / "base.h5", tmp_path / "other.h5").paired


def test_units_of_both_sides_are_named(made: Callable[..., Path]) -> None:
    found = compared(made("pre_norm"), made("pre_norm", text=MIXED, window=16))
    assert found.over == "windows of the first and documents of the second"


def test_one_window_has_no_interval(made: Callable[..., Path]) -> None:
    found = compared(made("pre_norm", max_tokens=128), made("post_norm", max_tokens=128))
    assert found.certainty.startswith("no intervals")
    assert found.loss is not None
    assert np.isnan(found.loss["low"])


class TestRefusals:
    """What cannot be compared is told."""

    def test_a_model(self, made: Callable[..., Path]) -> None:
        with pytest.raises(UsageError, match="only captures are compared"):
            sl.compare(made("pre_norm"), case("gpt2").module, progress=False)

    def test_a_measure_that_is_not_there(self, made: Callable[..., Path]) -> None:
        with pytest.raises(UsageError, match=r"no measure 'size'.*relative_write"):
            compared(made("pre_norm"), made("rope"), measure="size")
        with pytest.raises(UsageError, match=r"no row 'layer\.99'"):
            compared(made("pre_norm"), made("rope")).at("layer.99", "cosine")

    def test_a_capture_under_way(self, made: Callable[..., Path], tmp_path: Path) -> None:
        under_way = tmp_path / "x.h5.partial"
        shutil.copy(made("pre_norm", batch_tokens=256), under_way)
        with h5py.File(under_way, "r+") as file:
            file["/proof/done"][1] = 0
        with pytest.raises(MissingDataError, match="under way"):
            sl.compare(made("rope"), sl.open(under_way, allow_partial=True), progress=False)

    def test_position_0_alone(self, made: Callable[..., Path]) -> None:
        with pytest.raises(MissingDataError, match="position 0 alone"):
            compared(made("pre_norm", positions=[0]), made("rope", positions=[0]))

    def test_a_narrowed_capture(self, made: Callable[..., Path]) -> None:
        with pytest.raises(MissingDataError, match="narrowed"):
            compared(made("pre_norm"), made("rope", layers=[0, 1]))


class TestCommand:
    """The same numbers in the terminal."""

    def test_table_and_json(self, made: Callable[..., Path], tmp_path: Path) -> None:
        paths = str(made("pre_norm")), str(made("post_norm"))
        figure = tmp_path / "c.svg"
        result = CliRunner().invoke(main, ["compare", *paths, "--measure", "cosine", "--plot", str(figure)])
        assert result.exit_code == 0, result.stderr
        assert result.stdout.split("\n")[0].split() == ["label", "first", "second", "difference", "low", "high"]
        assert "both saw the same tokens" in result.stderr
        assert figure.stat().st_size > 5000
        told = json.loads(CliRunner().invoke(main, ["compare", *paths, "--json"]).stdout)
        found = compared(*map(Path, paths))
        assert told["rows"] == json.loads(json.dumps(found.rows()))
        assert (told["about"]["loss"], told["about"]["paired"]) == (found.loss, True)

    def test_moved(self, made: Callable[..., Path]) -> None:
        paths = str(made("pre_norm")), str(made("post_norm"))
        told = json.loads(CliRunner().invoke(main, ["compare", *paths, "--moved", "--json"]).stdout)
        assert len(told["rows"]) == 17 + 16
        other = str(made("pre_norm", text=MIXED, window=16))
        refused = CliRunner().invoke(main, ["compare", paths[0], other, "--moved"])
        assert refused.exit_code == MissingDataError.exit_code
        assert "same tokens" in refused.stderr


def test_names_with_dollars_are_drawn_as_they_are(made: Callable[..., Path], tmp_path: Path) -> None:
    odd = tmp_path / "cost_$a_{$.h5"
    shutil.copy(made("pre_norm"), odd)
    found = compared(made("pre_norm"), odd)
    assert found.save(tmp_path / "c.svg").stat().st_size > 5000
    save_figure(found.plot_both(), tmp_path / "both.svg")


@pytest.mark.parametrize("draw", ["plot", "plot_both"])
def test_figures_have_labels(made: Callable[..., Path], draw: str) -> None:
    found = compared(made("pre_norm"), made("post_norm"))
    ax = getattr(found, draw)()
    assert ax.get_xlabel().startswith("Layer of ")
    assert "|w| / |x|" in ax.get_ylabel()
    assert len(ax.get_legend().get_texts()) == (2 if draw == "plot" else 4)
