"""Drive a capture: run every batch, send what is seen to the file, prove it, and commit block by block."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor, nn

from streamlens.anatomy import Anatomy, Stream
from streamlens.calling import eager_math, invoke, without_cache
from streamlens.errors import ProofError
from streamlens.observation import Observer, StopForward, observing, tokens
from streamlens.proof import OnNorm, Replay, Verdict, norm_statistics
from streamlens.recorder.pilot import first_weight
from streamlens.recorder.plan import Block, Plan
from streamlens.store.layout import dtype_name
from streamlens.store.transfer import Transfer
from streamlens.store.writer import CaptureWriter

OnBlock = Callable[[int, int], None]
"""Called after each block with its number of tokens and of bytes."""

_SLOTS = 8


class _Recorder(Observer):
    """Sends one batch to the file while the model runs it, and follows the proof."""

    def __init__(self, plan: Plan, transfer: Transfer, parameters: Mapping[str, Tensor], number: int) -> None:
        self.plan = plan
        self.block = plan.blocks[number]
        self.number = number
        self.transfer = transfer
        self.verdict = Verdict()
        self.replays = {
            s.name: Replay(s, parameters, self.verdict, self._sending_norms(s) if s.name in plan.rows else None)
            for s in plan.pilot.anatomy.streams
        }
        self._rows = {name: {s.index: i for i, s in enumerate(rows)} for name, rows in plan.rows.items()}
        self._last = plan.pilot.anatomy.stream().name

    def part(self, stream: Stream, index: int, tensor: Tensor) -> None:
        self._demand_dtype(stream, "embed", index, tensor)
        self.replays[stream.name].part(index, tensor)
        if stream.name in self._rows:
            self._send(stream, f"embed/{stream.parts[index].label}", None, tensor)

    def state(self, stream: Stream, index: int, tensor: Tensor) -> None:
        self._demand_dtype(stream, "state", index, tensor)
        self.replays[stream.name].state(index, tensor)
        if stream.name in self._rows:
            self._keep_state(stream, index, tensor)
        if index == len(stream.steps) and stream.name == self._last and not self.plan.has_output:
            raise StopForward  # the head is not needed for anything that is stored

    def _keep_state(self, stream: Stream, index: int, tensor: Tensor) -> None:
        if index == 0 and stream.parts[0].point is None:
            self._send(stream, f"embed/{stream.parts[0].label}", None, tensor)
        if index == len(stream.steps):
            self._send(stream, "final", None, tensor)
        elif not self.plan.choice.compact:
            for sublayer in stream.steps[index].sublayers:
                row = self._rows[stream.name].get(sublayer)
                if row is not None:
                    self._send(stream, "read", row, tensor)

    def write(self, stream: Stream, index: int, tensor: Tensor) -> None:
        self._demand_dtype(stream, "write", index, tensor)
        self.replays[stream.name].write(index, tensor)
        row = self._rows.get(stream.name, {}).get(index)
        if row is not None:
            self._send(stream, "write", row, tensor)

    def value_mix(self, stream: Stream, index: int, tensor: Tensor) -> None:
        if index in self._rows.get(stream.name, {}):
            sublayer = stream.sublayers[index]
            laid_out = tokens(tensor, stream, *self._shape, mix_of=sublayer)
            path = f"/streams/{stream.name}/value_mix/{sublayer.label}"
            self.transfer.send(path, None, self.number, self._kept_rows(laid_out))

    def settled(self) -> None:
        for replay in self.replays.values():
            replay.settled()

    def output(self, logits: Tensor, position_first: bool) -> None:
        """Send the summary of the logits: (doc, position, vocab) in the model's layout."""
        load, choice = self.block.load, self.plan.choice
        laid_out = logits.transpose(0, 1) if position_first else logits
        ids = self.plan.feed.ids[load.start : load.start + load.docs * load.positions]
        targets = torch.from_numpy(ids).reshape(load.docs, load.positions).to(logits.device)
        summary = summarise(laid_out, targets, choice.top_k, self.plan.pilot.causal)
        for name, tensor in summary.items():
            self.transfer.send(f"/output/{name}", None, self.number, self._kept_rows(tensor))

    def _sending_norms(self, stream: Stream) -> OnNorm:
        def send(index: int, tensor: Tensor) -> None:
            source = tokens(tensor, stream, *self._shape)
            for name, value in zip(("mean", "rstd"), norm_statistics(stream.norms[index], source), strict=True):
                path = f"/streams/{stream.name}/norm/{name}"
                self.transfer.send(path, index, self.number, self._kept_rows(value))

        return send

    def _demand_dtype(self, stream: Stream, kind: str, index: int, tensor: Tensor) -> None:
        """Refuse what would be rounded on its way to the file: the proof looks at it before that."""
        expected = self.plan.pilot.own_dtypes[stream.name][kind][index]
        if tensor.dtype != expected:
            raise ProofError(
                f"{kind} {index} of stream {stream.name!r} is {dtype_name(tensor.dtype)} in block {self.number} and "
                f"was {dtype_name(expected)} in the pilot: the model chooses its dtype by the size of a batch. "
                "Capture with a smaller batch_tokens, or without autocast"
            )

    @property
    def _shape(self) -> tuple[int, int]:
        return self.block.load.docs, self.block.load.positions

    def _send(self, stream: Stream, what: str, row: int | None, tensor: Tensor) -> None:
        laid_out = tokens(tensor, stream, *self._shape)
        self.transfer.send(f"/streams/{stream.name}/{what}", row, self.number, self._kept_rows(laid_out))

    def _kept_rows(self, tensor: Tensor) -> Tensor:
        """(doc, position, ...) -> (token, ...), only the positions that are stored."""
        if self.block.kept is not None:
            tensor = tensor[:, torch.tensor(self.block.kept, device=tensor.device)]
        return tensor.flatten(0, 1)


def summarise(
    logits: Float[Tensor, "doc position vocab"], ids: Int64[Tensor, "doc position"], top_k: int, causal: bool
) -> dict[str, Shaped[Tensor, "doc position ..."]]:
    """Reduce logits to what analyses ask of them, document by document, so that no second copy of them is needed.

    Args:
        logits: (doc, position, vocab).
        ids: (doc, position) int64 token ids, negative where there are none.
        top_k: how many of the largest logits to keep.
        causal: whether the target of a position is the next token (else it is the token itself).

    Returns:
        lse (doc, position) log of the sum of exponentials, in nats; target_logit (doc, position), NaN where there is
        no target; topk_id and topk_logit (doc, position, top_k).
    """
    targets = torch.full_like(ids, -1)
    if causal:
        targets[:, :-1] = ids[:, 1:]
    else:
        targets = ids.clone()
    vocab = logits.shape[-1]
    known = (targets >= 0) & (targets < vocab)
    rows: dict[str, list[Tensor]] = {"lse": [], "target_logit": [], "topk_id": [], "topk_logit": []}
    for doc in range(len(logits)):
        wide = logits[doc].float()
        top = wide.topk(min(top_k, vocab), dim=-1)
        found = wide.gather(-1, targets[doc].clamp(0, vocab - 1)[:, None])[:, 0]
        rows["lse"].append(torch.logsumexp(wide, -1))
        rows["target_logit"].append(torch.where(known[doc], found, torch.nan))
        rows["topk_id"].append(top.indices.int())
        rows["topk_logit"].append(top.values)
    return {name: torch.stack(parts) for name, parts in rows.items()}


def record(
    module: nn.Module,
    plan: Plan,
    writer: CaptureWriter,
    parameters: Mapping[str, Tensor],
    *,
    allow_unproven: bool,
    on_block: OnBlock | None = None,
) -> None:
    """Run all blocks that are not done yet.

    Raises:
        ProofError: a block does not add up, unless `allow_unproven`.
        StorageError: writing stopped; what was committed stays.
    """
    anatomy = plan.pilot.anatomy
    largest = max(stop - start for start, stop in plan.layout.blocks)
    slot = max(i.dtype.itemsize * (i.width or 1) for i in plan.layout.items) * largest
    device = first_weight(parameters).device
    per_token = plan.n_bytes / plan.n_tokens
    with Transfer(writer, slot_bytes=slot, slots=_SLOTS, device=device) as transfer:
        for number in np.flatnonzero(~writer.done):
            block = plan.blocks[int(number)]
            recorder = _Recorder(plan, transfer, parameters, int(number))
            _run(module, anatomy, block, recorder)
            verdict = recorder.verdict
            verdict.resolve()
            if not allow_unproven:
                stream = anatomy.stream(verdict.stream or None)
                verdict.demand(stream, plan.pilot.dtypes[f"{stream.name}/read"])
            transfer.commit(int(number), exact=verdict.exact, worst=verdict.worst, where=verdict.state)
            if on_block is not None:
                on_block(block.stop - block.start, int(per_token * (block.stop - block.start)))


def _run(module: nn.Module, anatomy: Anatomy, block: Block, recorder: _Recorder) -> None:
    inputs = without_cache(module, block.load.inputs())
    with torch.no_grad(), eager_math():
        try:
            with observing(module, anatomy, recorder, mixes=recorder.plan.choice.heads):
                logits = invoke(module, inputs)
        except StopForward:
            return
        if recorder.plan.has_output:
            recorder.output(logits, anatomy.stream().position_first)
