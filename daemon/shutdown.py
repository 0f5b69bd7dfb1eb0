"""Signals of the system, and the end of the process, whatever hangs.

The first signal drains, the second hands the runs back, the third ends at once. A thread holds the deadlines: an event loop
that is blocked, a task that is deaf to cancellation, or a thread that cannot be stopped would not keep them.
"""

import asyncio
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

import structlog

log = structlog.stdlib.get_logger()

SIGNALS = (signal.SIGTERM, signal.SIGINT)
FLUSH_TIMEOUT = 10.0
"""Seconds to write the runs back that were handed back, before leaving all the same: the lease brings the rest back."""
LEAVE_TIMEOUT = 3.0
"""Seconds to say goodbye to the database."""
GRACE = FLUSH_TIMEOUT + LEAVE_TIMEOUT + 2.0
"""Seconds from the end of the drain, or from the second signal, to the end of the process."""


class Shutdown:
    """Two events, set by signals while the block runs; the deadlines hold until the process has ended.

    Args:
        drain_timeout: Seconds for runs to finish after the first signal.
    """

    def __init__(self, drain_timeout: float) -> None:
        self._drain_timeout = drain_timeout
        self._loop = asyncio.get_running_loop()
        self._signals = 0
        self._former: dict[signal.Signals, Any] = {}
        self.draining = asyncio.Event()
        self.insisted = asyncio.Event()

    def __enter__(self) -> Self:
        # Not by the event loop: one that is blocked would never hear of a signal.
        for number in SIGNALS:
            self._former[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, former in self._former.items():
            signal.signal(number, former)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._signals += 1
        match self._signals:
            case 1:
                self._set(self.draining)
                _cut_off_in(self._drain_timeout + GRACE, "it did not end in time")
            case 2:
                self._set(self.insisted)
                _cut_off_in(GRACE, "it was told twice and did not end in time")
            case _:
                _cut_off_in(0.0, f"it was told a third time ({signal.Signals(number).name})")

    def _set(self, event: asyncio.Event) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(event.set)


def _cut_off_in(seconds: float, reason: str) -> None:
    """End the process after some seconds. A thread of its own, which keeps no process from ending before."""
    timer = threading.Timer(seconds, _cut_off, [reason])
    timer.daemon = True
    timer.start()


def _cut_off(reason: str) -> None:
    # Logging may hang, too: its lock is held by a thread whose terminal takes no more.
    last_line = threading.Thread(target=_log_cut_off, args=[reason], daemon=True)
    last_line.start()
    last_line.join(timeout=1.0)
    os._exit(1)


def _log_cut_off(reason: str) -> None:
    log.error("daemon.cut_off", reason=reason, consequence="what it held comes back when its lease has lapsed")
