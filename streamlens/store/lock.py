"""One writer per file: a lock that the kernel gives back when its holder dies, however it dies."""

from __future__ import annotations

import errno
import fcntl
import os
import warnings
from pathlib import Path

from streamlens.errors import StorageError

_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS}


class WriterLock:
    """Exclusive right to write `path`, held through a file beside it (``NAME.lock``).

    Raises:
        StorageError: another process, which the message names, is writing there.
    """

    def __init__(self, path: Path) -> None:
        """Take the lock, without waiting."""
        self._path = path.with_name(path.name + ".lock")
        self._fd = self._take(path)
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def _take(self, target: Path) -> int:
        while True:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                holder = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
                os.close(fd)
                raise StorageError(
                    f"another capture is writing {target} (pid {holder}); wait for it, or choose another --out"
                ) from error
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    os.close(fd)
                    raise
                warnings.warn(
                    f"{target.parent} has no file locks: make sure that only one capture writes here", stacklevel=4
                )
                return fd
            # The last holder may have removed the file between our open and our lock: then our lock is on a file
            # that nobody else can find, and we start again.
            try:
                if os.path.samestat(os.fstat(fd), self._path.stat()):
                    return fd
            except FileNotFoundError:
                pass
            os.close(fd)

    def release(self) -> None:
        """Give the lock back and remove its file; a second call does nothing."""
        if self._fd < 0:
            return
        # Removed while still held, so that no newcomer can lock a file that is about to vanish.
        self._path.unlink(missing_ok=True)
        os.close(self._fd)
        self._fd = -1
