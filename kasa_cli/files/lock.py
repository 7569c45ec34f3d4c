"""The lock on an output, held for a whole run."""

import os
import time
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from kasa_cli.errors import Locked


class RunLock:
    """A lock that names its holder, and whose file may be removed by the holder.

    The name is in a file of its own, since an attempt to lock can empty the lock's file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.holder = path.with_name(f"{path.name}-holder")
        self._lock = FileLock(path, timeout=0, thread_local=False)

    def acquire(self) -> bool:
        """Take the lock; False if its file was removed meanwhile, so that the lock protects nothing."""
        try:
            self._lock.acquire()
        except Timeout:
            where = f"{self.path.parent} ({self._holder()})"
            raise Locked("another run is building this output", where, "wait until it ends") from None
        try:
            if self._guards():
                self._sign()
                return True
        except FileNotFoundError:
            pass
        self.release()
        return False

    def release(self) -> None:
        """Release the lock, if it is held."""
        self._lock.release()

    def remove(self) -> None:
        """Remove the lock's files, as their holder; the lock itself last."""
        self.holder.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)

    def _guards(self) -> bool:
        """Whether the file that is locked is still the one of that name."""
        locked = self._lock._context.lock_file_fd  # filelock has no public way to ask
        return locked is not None and os.path.samestat(self.path.stat(), os.fstat(locked))

    def _sign(self) -> None:
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        self.holder.write_text(f"pid {os.getpid()} on {os.uname().nodename} since {since}\n")

    def _holder(self) -> str:
        with suppress(OSError):
            return self.holder.read_text(errors="replace")[:200].strip() or "just started"
        return "just ended"
