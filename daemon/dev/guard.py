"""Stops what `image-jobs dev` has started if dev itself dies without a chance to do so (kill -9, out of memory).

A process of its own that waits for the end of its stdin, whose other end dev holds: then it interrupts every process
whose id it was told, the last one first, and insists. It needs nothing but the standard library.
"""

import os
import signal
import subprocess
import sys
import time
from types import TracebackType
from typing import Self

INTERRUPT_INTERVAL = 2.0
"""Seconds until a process is interrupted again: the daemon then hands its runs back."""

TRIES = 5


class Guard:
    """The guard, as dev sees it. Leaving the context ends it, and nothing else.

    Args:
        lock: A file descriptor that it keeps open, so that a lock is held until it has done its work.
    """

    def __init__(self, lock: int | None = None) -> None:
        self._lock = lock

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=[] if self._lock is None else [self._lock],
            start_new_session=True,  # the terminal's Ctrl-C is for dev
            text=True,
        )
        return self

    def watch(self, pid: int) -> None:
        """Adds a process."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{pid}\n")
        self._process.stdin.flush()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()


def main() -> None:
    """What the guard does."""
    pids = [int(line) for line in sys.stdin]
    for pid in reversed(pids):
        for number in (*[signal.SIGINT] * TRIES, signal.SIGKILL):
            if _ended(pid, number):
                break


def _ended(pid: int, number: signal.Signals) -> bool:
    """Sends a signal, and answers whether that was the end of it."""
    try:
        os.kill(pid, number)
        deadline = time.monotonic() + INTERRUPT_INTERVAL
        while time.monotonic() < deadline:
            os.kill(pid, 0)
            time.sleep(0.05)
    except ProcessLookupError:
        return True
    return False


if __name__ == "__main__":
    main()
