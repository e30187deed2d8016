"""No edit, run or observation may silently do nothing: a pass that does not come to a site is refused."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import streamlens as sl
from streamlens.anatomy import RESULT, Point
from streamlens.calling import invoke
from streamlens.edits import run_between
from streamlens.errors import AnatomyError
from streamlens.interception import Interception
from streamlens.proof import same_bits
from tests.conftest import Case, case

REFUSED = r".*another way through the model .*discover\(module, inputs\)"
IDS = torch.arange(33).reshape(3, 11) % 30 + 1


@pytest.fixture(autouse=True)
def without_gradients() -> Any:
    with torch.no_grad():
        yield


def shifted(name: str) -> tuple[Case, dict[str, Any]]:
    """A model and inputs for which it makes fewer (gpt2) or more (opt) additions before x_0 than for plain ids."""
    found = case(name)
    if name == "gpt2":
        return found, {**found.inputs, "position_ids": torch.arange(11).expand(3, -1)}  # type: ignore[dict-item]
    mask = torch.ones_like(IDS)
    mask[0, 6:] = 0
    return found, {"input_ids": IDS, "attention_mask": mask, "use_cache": False}


@pytest.mark.parametrize("name", ["gpt2", "opt"])
class TestOtherInputs:
    def test_observing_is_refused(self, name: str) -> None:
        found, inputs = shifted(name)
        with pytest.raises(AnatomyError, match=r"add\[\d\] in " + REFUSED), sl.observe(found.module, found.anatomy):
            invoke(found.module, inputs)

    def test_an_edit_is_refused(self, name: str) -> None:
        found, inputs = shifted(name)
        emptied = sl.edit(found.module, found.anatomy, states={0: lambda x: x * 0})
        with pytest.raises(AnatomyError, match=REFUSED), emptied:
            invoke(found.module, inputs)

    def test_a_run_from_a_state_is_refused(self, name: str) -> None:
        found, inputs = shifted(name)
        state = torch.zeros(3, 11, found.anatomy.stream().d_model)
        with pytest.raises(AnatomyError, match=REFUSED):
            sl.run_from(found.module, found.anatomy, 0, state, inputs)

    def test_the_other_way_round(self, name: str) -> None:
        found, inputs = shifted(name)
        anatomy = sl.discover(found.module, inputs)
        with pytest.raises(AnatomyError, match=REFUSED), sl.observe(found.module, anatomy):
            invoke(found.module, found.inputs)

    def test_what_is_advised_works(self, name: str) -> None:
        found, inputs = shifted(name)
        anatomy = sl.discover(found.module, inputs)
        plain = invoke(found.module, inputs)
        with sl.observe(found.module, anatomy) as seen:
            assert same_bits(invoke(found.module, inputs), plain)
        state = seen.states["main"][0]
        assert same_bits(sl.run_from(found.module, anatomy, 0, state, inputs), plain)
        assert not same_bits(sl.run_from(found.module, anatomy, 0, state * 2, inputs), plain)

    def test_a_context_goes_on_after_a_refusal(self, name: str) -> None:
        """The model is called twice in one context, and the second way is refused, but not the third."""
        found, inputs = shifted(name)
        with sl.edit(found.module, found.anatomy, states={0: torch.zeros_like}):
            first = invoke(found.module, found.inputs)
            with pytest.raises(AnatomyError, match=REFUSED):
                invoke(found.module, inputs)
            assert same_bits(invoke(found.module, found.inputs), first)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in found.module.modules())


def test_whole_numbers_are_no_state_even_where_they_are_as_wide() -> None:
    """As many positions as the stream is wide: OPT's counting of the mask has a state's width at the shifted site."""
    found = case("opt")
    ids = torch.arange(64).reshape(2, 32) % 30 + 1
    mask = torch.ones_like(ids)
    mask[0, 20:] = 0
    assert found.anatomy.stream().d_model == 32
    with pytest.raises(AnatomyError, match="int64" + REFUSED), sl.observe(found.module, found.anatomy):
        found.module(input_ids=ids, attention_mask=mask, use_cache=False)


class Branching(nn.Module):
    """A pre-norm model that leaves out its second layer where the inputs are long."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.head = nn.Linear(16, 32)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for index, layer in enumerate(self.layers):
            if index != 1 or input_ids.shape[1] < 11:
                x = layer(x)
        out: Tensor = self.head(x)
        return out


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(torch.relu(self.up(self.norm(x))))
        return out


@pytest.fixture
def branching() -> nn.Module:
    torch.manual_seed(0)
    return Branching().eval()


def test_the_message_names_the_site(branching: nn.Module) -> None:
    anatomy = sl.discover(branching, {"input_ids": IDS[:, :4]})
    refused = pytest.raises(AnatomyError, match=r"did not come to add\[0\] in layers\.1: these")
    with refused, sl.edit(branching, anatomy, writes={1: torch.zeros_like}):
        branching(IDS)
    with sl.edit(branching, anatomy, writes={2: torch.zeros_like}):  # the way to this one is the same
        branching(IDS)


@pytest.mark.parametrize("output", [True, False])
def test_a_later_batch_of_a_capture_that_takes_another_way(branching: nn.Module, output: bool, tmp_path: Path) -> None:
    """Without an output a pass ends early, once the last state is there: what came before is demanded all the same."""
    texts = [[1, 2, 3], list(range(1, 12)), list(range(2, 13))]
    shown: dict[str, Any] = {"tokens": texts, "ragged": True, "progress": False}
    with pytest.raises(AnatomyError, match=REFUSED):
        sl.capture(branching, out=tmp_path / "x.h5", batch_tokens=11, output=output, **shown)
    assert not (tmp_path / "x.h5").exists()
    with pytest.raises(AnatomyError, match=REFUSED):
        sl.contribution_norms(branching, **shown)


def test_a_run_to_a_state_that_is_not_met(branching: nn.Module) -> None:
    anatomy = sl.discover(branching, {"input_ids": IDS[:, :4]})
    state = torch.randn(3, 11, 16)
    with pytest.raises(AnatomyError, match=REFUSED):
        run_between(branching, anatomy, 0, state, 2, IDS)
    layers: Any = branching.layers
    assert same_bits(run_between(branching, anatomy, 0, state, 3, IDS), layers[2](layers[0](state)))


class TestEncoderDecoder:
    def test_each_stream_is_demanded_where_it_is_asked_for(self) -> None:
        """With the encoder's states given, the encoder does not run: an edit of it would do nothing."""
        found = case("t5")
        module: Any = found.module
        given: Any = found.inputs
        encoded = module.get_encoder()(input_ids=given["input_ids"])
        inputs = {"encoder_outputs": encoded, "decoder_input_ids": given["decoder_input_ids"], "use_cache": False}
        plain = invoke(module, inputs)
        with sl.edit(module, found.anatomy, writes={0: torch.zeros_like}, stream="decoder"):
            assert not same_bits(invoke(module, inputs), plain)
        changed = sl.edit(module, found.anatomy, writes=dict.fromkeys(range(4), torch.zeros_like), stream="encoder")
        with pytest.raises(AnatomyError, match=r"in encoder\..* \(and 3 more\)" + REFUSED), changed:
            invoke(module, inputs)

    @pytest.mark.parametrize("name", ["t5", "bart"])
    @pytest.mark.parametrize("stream", ["encoder", "decoder"])
    def test_an_edit_while_text_is_generated(self, name: str, stream: str) -> None:
        """`generate` runs the encoder by itself, once, and then the decoder step by step, with a cache."""
        found = case(name)
        module: Any = found.module
        ids = found.inputs["input_ids"]  # type: ignore[index]
        calls: list[int] = []

        def change(tensor: Tensor) -> Tensor:
            calls.append(1)
            return tensor * 0

        with sl.edit(module, found.anatomy, writes={0: change}, stream=stream):
            module.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=True)
        assert len(calls) == {"encoder": 1, "decoder": 4}[stream]


def test_an_edit_while_a_decoder_generates_with_its_cache() -> None:
    """With the oracle of whole passes without a cache, in the same edit."""
    found = case("llama")
    module: Any = found.module
    end = module.generation_config.eos_token_id
    with sl.edit(module, found.anatomy, writes={1: lambda w: w * 3.0}):
        generated = module.generate(IDS, max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=True)
        ids = IDS
        for _ in range(4):
            logits = module(input_ids=ids, use_cache=False).logits[:, -1:]
            logits[..., end] = -torch.inf  # as `min_new_tokens` has it
            ids = torch.cat([ids, logits.argmax(-1)], dim=1)
    assert torch.equal(generated, ids)
    assert not torch.equal(generated, module.generate(IDS, max_new_tokens=4, min_new_tokens=4, do_sample=False))


class TestInterrupted:
    def test_the_models_own_exception_comes_through(self) -> None:
        found = case("gpt2")
        with sl.observe(found.module, found.anatomy), warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(IndexError):
                found.module(input_ids=IDS + 10**6)

    def test_a_pass_after_one_that_failed_is_edited(self) -> None:
        found = case("gpt2")
        layer: Any = found.module.get_submodule("transformer.h.1")
        with sl.edit(found.module, found.anatomy, writes={0: torch.zeros_like}):
            edited = invoke(found.module, found.inputs)
            handle = layer.register_forward_pre_hook(_fail)
            with pytest.raises(RuntimeError, match="mine"):
                invoke(found.module, found.inputs)
            handle.remove()
            assert same_bits(invoke(found.module, found.inputs), edited)

    def test_a_run_between_in_an_edit_twice(self) -> None:
        found = case("gpt2")
        state = torch.randn(3, 11, 32)
        args: Any = (found.module, found.anatomy, 0, state, 2, found.inputs)
        with sl.edit(found.module, found.anatomy, writes={0: lambda w: w * 0, 1: lambda w: w * 0}):
            assert same_bits(run_between(*args), state)
            assert same_bits(run_between(*args), state)

    def test_two_refusals_at_once(self) -> None:
        found, inputs = shifted("gpt2")
        edits = [sl.edit(found.module, found.anatomy, states={0: torch.zeros_like}) for _ in range(2)]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(AnatomyError, match=REFUSED), edits[0], edits[1]:
                invoke(found.module, inputs)

    def test_a_pass_is_demanded_while_another_exception_is_handled(self) -> None:
        found, inputs = shifted("gpt2")
        try:
            raise ValueError("mine")
        except ValueError:
            with pytest.raises(AnatomyError, match=REFUSED), sl.observe(found.module, found.anatomy):
                invoke(found.module, inputs)


def _fail(*args: Any) -> None:
    raise RuntimeError("mine")


class TestReactions:
    """What a change computes is no call of the model's own: it must not shift the sites of a context around it."""

    def test_a_change_that_adds(self) -> None:
        found = case("gptj")
        s = found.anatomy.stream().sublayers[0].index
        with sl.observe(found.module, found.anatomy) as before:
            invoke(found.module, found.inputs)
        changes = {s: lambda w: torch.add(torch.add(w, 1.0), 1.0)}
        with sl.observe(found.module, found.anatomy) as after, sl.edit(found.module, found.anatomy, writes=changes):
            invoke(found.module, found.inputs)
        assert same_bits(after.writes["main"][s], before.writes["main"][s] + 1.0 + 1.0)
        assert same_bits(after.writes["main"][s + 1], before.writes["main"][s + 1])

    def test_a_change_that_runs_a_module_of_the_model(self) -> None:
        """Its executions must not count: by the oracle of the same change with its answer computed beforehand."""
        found = case("gpt2")
        layer: Any = found.module.get_submodule("transformer.h.1")

        def through(x: Tensor) -> Tensor:
            out = layer(x)
            made: Tensor = out[0] if isinstance(out, tuple) else out
            return made.reshape(x.shape)

        with sl.observe(found.module, found.anatomy) as before:
            invoke(found.module, found.inputs)
        wanted = through(before.states["main"][0])
        outputs = []
        for change in (through, lambda x: wanted.clone()):
            with sl.edit(found.module, found.anatomy, states={0: change}, writes={2: torch.zeros_like}):
                outputs.append(invoke(found.module, found.inputs))
        assert same_bits(*outputs)
        edited = sl.edit(found.module, found.anatomy, states={0: through})
        with sl.observe(found.module, found.anatomy) as after, edited:
            invoke(found.module, found.inputs)
        assert same_bits(after.states["main"][0], wanted)

    def test_a_change_that_runs_the_model_in_a_context_of_its_own(self) -> None:
        found = case("gpt2")

        def patched(x: Tensor) -> Tensor:
            with sl.observe(found.module, found.anatomy) as inner:
                invoke(found.module, {"input_ids": IDS})
            return inner.states["main"][2]

        with sl.observe(found.module, found.anatomy) as other:
            wanted = invoke(found.module, {"input_ids": IDS})
        with sl.edit(found.module, found.anatomy, states={2: patched}):
            assert same_bits(invoke(found.module, found.inputs), wanted)
        assert len(other.states["main"]) == 7


@pytest.mark.parametrize("wrong", [lambda s: Point(s.write.site, "9"), lambda s: Point(s.write.site, "missing")])
def test_a_reaction_is_given_a_tensor_or_refused(wrong: Callable[[Any], Point]) -> None:
    found = case("gpt2")
    seen: list[Any] = []
    point = wrong(found.anatomy.stream().sublayers[0])
    looking = Interception(found.module, found.anatomy, {point: seen.append})
    with pytest.raises(AnatomyError, match="given NoneType, not a tensor" + REFUSED), looking:
        invoke(found.module, found.inputs)
    assert seen == []


def test_a_point_that_the_anatomy_does_not_name_may_have_any_width() -> None:
    found = case("gpt2")
    seen: list[Tensor] = []
    mix = found.anatomy.stream().sublayers[0].value_mix
    assert mix is not None
    with Interception(found.module, found.anatomy, {mix: seen.append, Point(mix.site, RESULT): seen.append}):
        invoke(found.module, found.inputs)
    assert len(seen) == 2


def test_another_thread_is_not_in_the_context() -> None:
    """As with `torch.no_grad`; its passes neither raise nor disturb those of the thread that edits."""
    found = case("gpt2")
    plain = invoke(found.module, found.inputs)
    results: list[Tensor] = []
    inside, done = threading.Event(), threading.Event()

    def other() -> None:
        inside.wait(20)
        with torch.no_grad():
            results.append(invoke(found.module, found.inputs))
        done.set()

    def change(w: Tensor) -> Tensor:
        inside.set()  # the other pass runs whole in the middle of this one
        assert done.wait(20)
        return w * 0

    thread = threading.Thread(target=other)
    thread.start()
    with sl.edit(found.module, found.anatomy, writes={0: change, 1: torch.zeros_like, 5: torch.zeros_like}):
        edited = invoke(found.module, found.inputs)
    thread.join()
    assert same_bits(results[0], plain)
    zeros = dict.fromkeys((0, 1, 5), torch.zeros_like)
    with sl.edit(found.module, found.anatomy, writes=zeros):
        assert same_bits(invoke(found.module, found.inputs), edited)
