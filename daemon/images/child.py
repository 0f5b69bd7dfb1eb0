"""The entry of a child process: python -m daemon.images.child. It decodes images and does nothing else.

A job is a line on the standard input, its result one on the standard output. It ends when its input does, also in the middle
of a job: that is how it dies with the daemon, however that was killed.
"""

import os
import queue
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from daemon.images import decoding
from daemon.images.jobs import Job, dump, load

_STACK = 256 * 1024


def main() -> None:
    """Work until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # What a library prints must not be taken for a result.
    results = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    jobs: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.stack_size(_STACK)
    threading.Thread(target=_listen, args=(sys.stdin.buffer, jobs), daemon=True).start()
    _limit_memory()
    while True:
        job = load(jobs.get())
        assert isinstance(job, Job)
        _limit_time(job.cpu_seconds)
        try:
            result = decoding.work(job)
        except Exception as error:  # noqa: BLE001 - a bug of ours, for the daemon's log
            result = decoding.crashed(error)
        results.write(dump(result))


def _listen(requests: BinaryIO, jobs: "queue.SimpleQueue[bytes]") -> None:
    for line in requests:
        jobs.put(line)
    os._exit(0)


def _limit_memory() -> None:
    """Bound the address space to what it is now and `MEMORY`; systems without such a limit (macOS) have the pixels' alone.

    Where the kernel must end a process for want of memory, it takes this one first.
    """
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    with suppress(OSError, ValueError, ImportError):
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        size = pages * os.sysconf("SC_PAGE_SIZE") + decoding.MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _limit_time(seconds: int) -> None:
    """Let the system end this process (SIGXCPU) after so much processor time from now on; it counts that of its whole life."""
    with suppress(OSError, ValueError, ImportError):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        limit = int(time.process_time()) + 1 + seconds
        resource.setrlimit(resource.RLIMIT_CPU, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


if __name__ == "__main__":
    main()
