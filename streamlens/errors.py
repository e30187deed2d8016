"""Every error that streamlens raises on purpose, and the exit code that the command line gives it.

Each class also subclasses the builtin that a caller would already catch. A message says what is wrong, where,
and what to do about it.
"""

from __future__ import annotations


class StreamlensError(Exception):
    """Base of all errors raised on purpose; the command line prints its message without a traceback."""

    exit_code = 1


class UsageError(StreamlensError, ValueError):
    """A request that contradicts itself or names something that does not exist."""

    exit_code = 2


class CheckpointError(StreamlensError, ValueError):
    """A model file that cannot be loaded, or that does not fit its config."""


class CorpusError(StreamlensError, ValueError):
    """Text or tokens that cannot be turned into windows for this model."""


class AnatomyError(StreamlensError, ValueError):
    """A residual stream that could not be found, or not be found again: the message names what puzzled."""


class MissingDataError(StreamlensError, LookupError):
    """A capture, or a model, that does not hold what was asked of it."""


class FormatError(StreamlensError, ValueError):
    """A file that is not a streamlens capture, or one of a newer format version."""


class StorageError(StreamlensError, OSError):
    """Writing stopped (disk full, read-only folder, busy file); what was committed is kept and can be resumed."""

    exit_code = 3


class ProofError(StreamlensError, ArithmeticError):
    """The writes do not add up to the states that the model computed."""

    exit_code = 4


class IntegrityError(StreamlensError, ValueError):
    """Stored bytes are not the bytes that were written."""

    exit_code = 4


class UnsafeFileError(StreamlensError, PermissionError):
    """A file that would run code, or reach outside itself, if it were opened."""

    exit_code = 5
