"""How far a run has come, on stderr: a bar where somebody watches, a line at either end where nobody does."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

from streamlens.wording import counted, human_bytes

if TYPE_CHECKING:
    from tqdm import tqdm

_QUIET: list[quiet] = []
"""Who asked for silence and did not take it back. Of the process, not of a context: each cell of a notebook may run in
a context of its own, and what the first cell asks for holds in all of them."""

_LOG = logging.getLogger("streamlens")
"""What all modules log to: the notes."""


class quiet:
    """Show no progress and no notes, whatever a call is asked for: inside a ``with``, or from now on.

    Example:
        >>> import io
        >>> shown = io.StringIO()
        >>> with quiet(), Progress(8, "capture", stream=shown) as progress:
        ...     progress.update(8)
        >>> shown.getvalue(), silent()
        ('', False)
    """

    def __init__(self) -> None:
        """Begin at once, so that a call alone, ``sl.quiet()``, holds for the rest of the session."""
        self._level = _LOG.level
        _QUIET.append(self)
        _LOG.setLevel(logging.ERROR)

    def __repr__(self) -> str:
        """Return what a notebook shows after the bare call."""
        return "<quiet: no progress and no notes>"

    def __enter__(self) -> Self:
        """Go on."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take it back; what others asked for holds."""
        if self not in _QUIET:
            return
        after = _QUIET.index(self) + 1
        if after < len(_QUIET):  # the level from before goes to whoever ends later
            _QUIET[after]._level = self._level
        else:
            _LOG.setLevel(self._level)
        _QUIET.remove(self)


def silent() -> bool:
    """Tell whether nothing is to be shown."""
    return bool(_QUIET)


class Progress:
    """Counts tokens and bytes of a run and shows tokens/s, MB/s and the time left.

        with Progress(windows.n_tokens, "capture") as progress:
            for batch in batches:
                progress.update(tokens, n_bytes)

    On a terminal, or in a notebook, there is a bar. Elsewhere (a log, CI) one line is written at the start and one at
    the end, which says whether the run finished.
    """

    def __init__(
        self,
        total_tokens: int,
        label: str,
        *,
        done_tokens: int = 0,
        enabled: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare, without showing anything yet.

        Args:
            total_tokens: tokens in all.
            label: the word in front of the bar.
            done_tokens: tokens done by an earlier run.
            enabled: whether to show anything at all; under `quiet`, nothing is shown either way.
            stream: where to write; stderr by default.
            clock: counts seconds.
        """
        self.total_tokens = total_tokens
        self.label = label
        self.enabled = enabled and not silent()
        self.tokens = done_tokens
        self.n_bytes = 0
        self._resumed_from = done_tokens
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._bar: tqdm[None] | None = None

    def __enter__(self) -> Self:
        """Start the clock and show the bar, or the first line."""
        self._started = self._clock()
        if self.enabled and (self._stream.isatty() or "ipykernel" in sys.modules):
            from tqdm import tqdm

            self._bar = tqdm(
                total=self.total_tokens,
                initial=self.tokens,
                desc=self.label,
                unit="tok",
                unit_scale=True,
                file=self._stream,
                dynamic_ncols=True,
            )
        else:
            resumed = f", {self.tokens:,} of them done before" if self.tokens else ""
            self._line(f"{counted(self.total_tokens, 'token')}{resumed}")
        return self

    def update(self, tokens: int, n_bytes: int = 0) -> None:
        """Count tokens that are done and the bytes that they took, where that means something."""
        self.tokens += tokens
        self.n_bytes += n_bytes
        if self._bar is not None and n_bytes:
            self._bar.set_postfix_str(f"{human_bytes(int(self.n_bytes / self._seconds()))}/s", refresh=False)
        if self._bar is not None:
            self._bar.update(tokens)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the bar and say what was done, in which time.

        A generator that is left before its end cannot tell whether its reader has enough or has failed (that says so
        by itself), so then the line counts and does not judge.
        """
        if self._bar is not None:
            self._bar.close()
        seconds = self._seconds()
        so_far = f"{self.tokens:,} of {counted(self.total_tokens, 'token')}"
        left = kind is not None and issubclass(kind, GeneratorExit)
        outcome = "done" if kind is None else so_far if left else f"stopped after {so_far}"
        done = self.tokens - self._resumed_from
        size = f", {human_bytes(self.n_bytes)}" if self.n_bytes else ""
        speed = f", {human_bytes(int(self.n_bytes / seconds))}/s" if self.n_bytes else ""
        self._line(
            f"{outcome}: {counted(done, 'token')}{size} in {seconds:.1f} s ({done / seconds:,.0f} tokens/s{speed})"
        )

    def _seconds(self) -> float:
        return max(self._clock() - self._started, 1e-9)

    def _line(self, text: str) -> None:
        if not self.enabled:
            return
        print(f"{self.label}: {text}", file=self._stream, flush=True)
