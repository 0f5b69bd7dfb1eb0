"""The events by which the parts of a daemon wake each other, so that none is built with a callback into another."""

import asyncio


class Signals:
    """Events and flags of one daemon. Each has one part that waits for it and clears it; any part may set it.

    `work`: the dispatcher has something to do, `look`: there may be runs to claim, `out_of_sync`: claims must be compared
    and whole lanes scanned. `sweep`: orphans looks for deliveries without a run. `cancel`: there may be provider jobs to
    cancel. `remove`: there may be files to remove.
    """

    def __init__(self) -> None:
        self.work = asyncio.Event()
        self.sweep = asyncio.Event()
        self.cancel = asyncio.Event()
        self.remove = asyncio.Event()
        self.look = True
        self.out_of_sync = True

    def wake(self) -> None:
        """Make the dispatcher look for runs to claim."""
        self.look = True
        self.work.set()

    def resync(self) -> None:
        """Make the dispatcher compare the claims it holds, and scan whole lanes."""
        self.out_of_sync = True
        self.wake()

    def connected(self) -> None:
        """Make all parts look: notifications may have been missed before the listener (re)connected."""
        self.resync()
        self.sweep.set()
        self.cancel.set()
        self.remove.set()
