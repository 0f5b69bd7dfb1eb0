"""How many runs may be claimed: none while their pictures could not be kept.

Money is spent by a call, and lost if its picture has nowhere to go. So storage has to take uploads, and this machine needs
room; both are looked at before runs are claimed, and again right before a call is sent.
"""

from daemon.errors import Retryable
from daemon.storage.breaker import Breaker
from daemon.worker.room import Room


class Intake:
    """Decides whether runs may be claimed and calls be sent.

    Args:
        breaker: Whether storage takes uploads.
        room: Whether this machine has room for pictures.
    """

    def __init__(self, breaker: Breaker, room: Room) -> None:
        self._breaker = breaker
        self._room = room

    def slots(self, held: int) -> int:
        """Return how many runs may be claimed beside `held` ones. Checks of parked runs count: they store, too."""
        return 0 if self._breaker.closed else self._room.fits(held)

    def check(self) -> None:
        """Make sure, right before a call is sent, that its picture could be kept.

        Raises:
            Retryable: If storage takes no uploads: nothing was sent.
            OSError: If this machine has no room.
        """
        if self._breaker.closed:
            reason = self._breaker.reason
            raise Retryable(
                reason.message if reason is not None else "It is not known yet whether storage takes images.",
                code=reason.code if reason is not None else "storage_unavailable",
                hint="Nothing was sent, or paid.",
                accepted=False,
            )
        self._room.check()

    def disk_failed(self, error: OSError) -> None:
        """Claim nothing more until this machine's disk works again."""
        self._room.failed(error)

    @property
    def closed(self) -> str | None:
        """Why no run is claimed, in one sentence; None while runs are."""
        if self._breaker.closed and self._breaker.reason is not None:
            return self._breaker.reason.message
        return "The daemon has no room to keep a picture." if self._room.short else None
