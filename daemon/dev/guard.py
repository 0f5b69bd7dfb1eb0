"""Stops the processes of `image-jobs dev` when dev itself dies without stopping them (kill -9, out of memory).

A process of its own that waits for the end of its stdin, which dev holds open. Then it interrupts the processes whose ids
it has read there, the last one first, and kills those that do not end. It imports the standard library alone.
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
    """Run the guard for as long as the context lasts.

    Args:
        lock: A file descriptor that the guard inherits: the lock is held until all processes have ended.
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
        """Add a process."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{pid}\n")
        self._process.stdin.flush()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()


def main() -> None:
    """Read process ids until stdin ends, then stop the processes."""
    pids = [int(line) for line in sys.stdin]
    for pid in reversed(pids):
        for number in (*[signal.SIGINT] * TRIES, signal.SIGKILL):
            if _ended(pid, number):
                break


def _ended(pid: int, number: signal.Signals) -> bool:
    """Send a signal. Return whether the process has ended within `INTERRUPT_INTERVAL`."""
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
