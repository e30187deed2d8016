"""Discovery against anatomies written by hand, and against models that it must refuse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from fixtures import zoo
from streamlens.anatomy import Anatomy
from streamlens.discovery.streams import discover
from streamlens.errors import AnatomyError, MissingDataError, UsageError
from tests.conftest import case


@pytest.mark.parametrize("name", zoo.names())
class TestZoo:
    def test_sublayers_are_those_written_by_hand(self, name: str) -> None:
        found = case(name)
        got = {s.name: tuple((x.kind, x.label, x.layer) for x in s.sublayers) for s in found.anatomy.streams}
        assert got == dict(found.expected.streams)

    def test_embedding_parts_are_those_written_by_hand(self, name: str) -> None:
        found = case(name)
        got = {s.name: tuple(p.label for p in s.parts) for s in found.anatomy.streams}
        assert got == {k: tuple(v) for k, v in found.expected.parts.items()}

    def test_norms_stand_where_they_were_written_by_hand(self, name: str) -> None:
        found = case(name)
        got = {s.name: {x.norm for x in s.sublayers} for s in found.anatomy.streams}
        assert got == {k: {v} for k, v in found.expected.norm.items()}

    def test_parallel_sublayers_read_one_state(self, name: str) -> None:
        found = case(name)
        for stream in found.anatomy.streams:
            reads = [s.read for s in stream.sublayers]
            assert (len(set(reads)) < len(reads)) == found.expected.parallel

    def test_anatomy_survives_json(self, name: str) -> None:
        anatomy = case(name).anatomy
        assert Anatomy.from_json(anatomy.to_json()) == anatomy


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("no_residual", "no addition in this model adds the output of a branch"),
        ("hyper_connections", r"aten\.add\.Tensor in layers\.0 .*none of its terms is an unchanged earlier state"),
        ("long_skip", r"aten\.cat\.default in the model .*not in an addition"),
        ("highway", r"layers\.0 .*the state is multiplied by an activation"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(name: str, complaint: str) -> None:
    specimen = zoo.build_negative(name)
    with pytest.raises(AnatomyError, match=complaint):
        discover(specimen.module, specimen.inputs.get("", dict(specimen.inputs)))


def test_a_wide_model_is_discovered_without_its_weights() -> None:
    transformers = pytest.importorskip("transformers")
    with FakeTensorMode():
        config = transformers.LlamaConfig(
            hidden_size=8192, intermediate_size=28672, num_hidden_layers=4, num_attention_heads=64, vocab_size=32000
        )
        model = transformers.LlamaForCausalLM(config).eval()
        anatomy = discover(model, {"input_ids": torch.zeros(2, 7, dtype=torch.long)})
    assert anatomy.stream().d_model == 8192
    assert anatomy.stream().labels == tuple(f"{i}_{k}_out" for i in range(4) for k in ("attn", "mlp"))
    assert anatomy.head.vocab == 32000


def test_discovery_leaves_the_model_as_it_was() -> None:
    found = case("gpt2")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in found.module.modules())
    assert torch.backends.mha.get_fastpath_enabled()


class _Breaking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.inner(x)
        raise RuntimeError("from inside")


def test_hooks_are_removed_when_the_model_raises() -> None:
    model = _Breaking()
    with pytest.raises(RuntimeError, match="from inside"):
        discover(model, torch.zeros(2, 3, 4))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class _Projecting(nn.Module):
    """A stream that a linear map cuts in two halves of different width: no single chain."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.between = nn.Linear(8, 6)
        self.second = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.first:
            x = x + layer(x)
        x = self.between(x)
        for layer in self.second:
            x = x + layer(x)
        return x


def test_stages_of_different_width_are_streams_of_their_own() -> None:
    anatomy = discover(_Projecting().eval(), torch.randn(2, 5, 8))
    assert [(s.d_model, len(s.sublayers)) for s in anatomy.streams] == [(8, 2), (6, 3)]


class _LowRank(nn.Module):
    """An adapter inside the branch: its addition is alike, and is not on the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.full, self.down, self.up = nn.Linear(8, 8), nn.Linear(8, 2), nn.Linear(2, 8)

    def forward(self, x: Tensor) -> Tensor:
        written: Tensor = self.full(x) + self.up(self.down(x))
        return x + written


def test_the_sum_inside_an_adapter_is_one_write() -> None:
    assert discover(_LowRank().eval(), torch.randn(2, 5, 8)).stream().labels == ("0_mlp_out",)


class _TokenMixer(nn.Module):
    """A linear map over positions: MLP-Mixer's first half."""

    def __init__(self) -> None:
        super().__init__()
        self.over_positions, self.over_channels = nn.Linear(5, 5), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.over_positions(x.transpose(1, 2)).transpose(1, 2)
        written: Tensor = self.over_channels(x)
        return x + written


def test_a_linear_map_over_positions_is_a_mixer() -> None:
    mixer = _TokenMixer().eval()  # PyTorch multiplies by weights that are frozen in another way
    for module in (mixer, mixer.requires_grad_(False)):
        found = discover(module, torch.randn(2, 5, 8)).stream()
        assert [s.kind for s in found.sublayers] == ["mixer", "mlp"]


class _Subtracting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x - self.a(x)
        return torch.add(x, self.b(x), alpha=0.5)


def test_a_subtracted_or_scaled_operand_is_found_with_its_factor() -> None:
    stream = discover(_Subtracting().eval(), torch.randn(2, 5, 8)).stream()
    assert [s.sign for s in stream.sublayers] == [-1.0, 0.5]


def test_an_unknown_label_names_near_ones() -> None:
    with pytest.raises(MissingDataError, match="near names: 1_attn_out"):
        case("gpt2").anatomy.stream().find("1_atn_out")


def test_inputs_of_another_kind_are_refused() -> None:
    with pytest.raises(UsageError, match="not list"):
        discover(nn.Linear(2, 2), [1, 2])


def test_the_factor_on_a_skip_is_part_of_the_anatomy() -> None:
    """A number in the code, a parameter by its name, and nothing where the skip is plain."""
    constant = [step.scale for step in case("scaled_skip_constant").anatomy.stream().steps]
    assert constant == pytest.approx([0.9, 1.2, 0.9, 1.2])
    found = case("scaled_skip_parameter")
    names = [step.scale for step in found.anatomy.stream().steps]
    assert all(name in dict(found.module.named_parameters()) for name in names)
    assert all(step.scale is None for step in case("gpt2").anatomy.stream().steps)
