"""`streamlens.verify`: every hash of a capture again, and the whole proof again, from the stored numbers alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from streamlens.errors import IntegrityError
from streamlens.proof import Verdict, bound, place
from streamlens.reader.opening import open_capture
from streamlens.reader.stream import StreamView
from streamlens.replay import advance, embed
from streamlens.store.integrity import Problem
from streamlens.store.integrity import verify as verify_bytes
from streamlens.wording import counted


@dataclass(frozen=True)
class Verification:
    """What a second look at a capture found."""

    path: Path
    problems: tuple[Problem, ...]
    """Bytes that are not those that were written."""
    blocks: int
    """Blocks whose stream was added up again, over all streams."""
    exact_blocks: int
    """How many of them gave the stored states bit for bit."""
    worst: float
    """Largest relative L2 error of a state."""
    where: str
    """The state with that error; empty when all are exact."""
    states: int
    """Stored states that were compared in each block."""
    within_bound: bool
    """Whether every error is within what the dtype allows."""

    def __str__(self) -> str:
        """Return the verdict in one line."""
        if self.problems:
            damage = counted(len(self.problems), "place")
            return f"{self.path} is damaged in {damage}, first in {self.problems[0].place}"
        if not self.within_bound:
            return f"{self.path}: the writes do not add up: {self.where} is off by {self.worst:.3g} (relative L2)"
        if self.exact_blocks == self.blocks:
            return f"{self.path}: every hash matches and all blocks add up bit for bit ({self.blocks})"
        return (
            f"{self.path}: every hash matches and {self.exact_blocks} of {self.blocks} blocks add up bit for bit; "
            f"worst relative error {self.worst:.3g} at {self.where}, which the dtype allows"
        )

    def __repr__(self) -> str:
        """Return the verdict in one line."""
        return f"<verification of {self}>"

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems and self.within_bound

    def demand(self) -> None:
        """Accept, or raise.

        Raises:
            IntegrityError: bytes differ, or the writes do not add up; the message names the first places.
        """
        if self.problems:
            shown = "\n  ".join(str(p) for p in self.problems[:5])
            more = f"\n  and {len(self.problems) - 5} more" if len(self.problems) > 5 else ""
            raise IntegrityError(f"{self.path} is damaged:\n  {shown}{more}\nCapture it again, or restore a copy.")
        if not self.within_bound:
            raise IntegrityError(
                f"{self.path}: the stored writes do not add up: {self.where} is off by {self.worst:.3g} (relative L2)"
            )


def verify(path: str | Path, *, on_block: Callable[[int, int], None] | None = None) -> Verification:
    """Check a capture: its bytes against their hashes, and its stored states against a replay of its writes.

    Args:
        path: the finished file.
        on_block: called with the number of tokens and bytes of each block that was replayed.

    Raises:
        FormatError, IntegrityError, UnsafeFileError: it cannot be opened; see `streamlens.open`.
    """
    problems = tuple(verify_bytes(path))
    with open_capture(path) as capture:
        verdict = Verdict()
        blocks = exact = states = 0
        limit = float("inf")
        for view in capture.streams.values():
            limit = min(limit, bound(view.state_dtype))
            compared, own_blocks, own_exact = _add_up(view, verdict, on_block)
            states, blocks, exact = states + compared, blocks + own_blocks, exact + own_exact
        where = "" if not verdict.stream else place(capture.anatomy.stream(verdict.stream), verdict.state)
    return Verification(Path(path), problems, blocks, exact, verdict.worst, where, states, verdict.worst <= limit)


def _add_up(view: StreamView, total: Verdict, on_block: Callable[[int, int], None] | None) -> tuple[int, int, int]:
    """Replay each block of a stream; return how many states it compares, how many blocks, how many were exact."""
    stream = view.anatomy
    known = [k for k in range(len(stream.states)) if view.holds_state(k)]
    writable = [all(s in view.stored for s in step.sublayers) for step in stream.steps]
    blocks = exact = 0
    for block in view.blocks():
        before = Verdict()
        # A stored state restarts the replay, so that one wrong write is blamed and not all that follow it.
        state = embed(stream, block.parts, view.constants).reshape(block.parts[0].shape)
        reached = True
        for index in range(len(stream.states)):
            if index in known:
                if reached:
                    before.note(stream, index, state, block.states[index])
                state, reached = block.states[index], True
            if index < len(stream.steps):
                reached = reached and writable[index]
                if reached:
                    writes = {s: block.writes[s] for s in stream.steps[index].sublayers}
                    state = advance(stream, index, state, writes, view.constants).reshape(state.shape)
        blocks, exact = blocks + 1, exact + before.exact
        total.include(before)
        if on_block is not None:
            rows = len(view.stored) * (1 if view.compact else 2) + len(block.parts) + 1
            on_block(block.stop - block.start, rows * block.parts[0].nbytes)
    return len(known), blocks, exact
