"""The lock on an output in the making, held for a whole run."""

import os
import time
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from kasa_cli.errors import Locked


class RunLock:
    """A lock that names its holder, and whose file may be removed by the holder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._locked: os.stat_result | None = None
        self._lock = FileLock(
            path, timeout=0, thread_local=False, fallback_to_soft=False, on_acquired=self._sign
        )

    def acquire(self) -> bool:
        """Take the lock; False if its file was removed in the meantime, so that it guards nothing."""
        try:
            self._lock.acquire()
        except Timeout:
            where = f"{self.path.parent} ({self._holder()})"
            raise Locked("another run is building this output", where, "wait until it ends") from None
        try:
            if self._locked and os.path.samestat(self.path.stat(), self._locked):
                return True
        except FileNotFoundError:
            pass
        self.release()
        return False

    def release(self) -> None:
        """Give the lock back, if it is held."""
        self._lock.release()

    def _sign(self, descriptor: int) -> None:
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"pid {os.getpid()} on {os.uname().nodename} since {since}\n".encode(), 0)
        self._locked = os.fstat(descriptor)

    def _holder(self) -> str:
        with suppress(OSError):
            return self.path.read_text(errors="replace")[:200].strip() or "just started"
        return "just ended"
