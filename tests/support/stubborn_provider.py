"""A provider that cannot be stopped, in every way that code of others has: each model is one."""

import asyncio
import os
import sys
import time

from daemon.providers import Generated, Model, Provider, Reporter, Request
from daemon.settings import Settings

SETTING = "STUBBORN"
MODELS = tuple(Model(name, source="this file") for name in ("deaf", "thread", "blocked", "aclose"))


def create(_settings: Settings) -> Provider | None:
    """The provider, where the variable is set."""
    return Stubborn() if os.environ.get(SETTING) else None


class Stubborn:
    """Hangs."""

    models = MODELS

    def __init__(self) -> None:
        self._hang = False

    async def aclose(self) -> None:
        """Hang, if the last model was `aclose`."""
        if self._hang:
            await asyncio.sleep(3600)

    async def generate(self, request: Request, report: Reporter) -> Generated:
        """Hang: deaf to cancellation, in a thread, with the event loop blocked; or later, in `aclose`."""
        report.submitted({}, estimate=0.01)
        print(f"stubborn {request.model}", file=sys.stderr, flush=True)  # noqa: T201
        match request.model:
            case "thread":
                await asyncio.to_thread(time.sleep, 3600)
            case "blocked":
                await asyncio.sleep(0.3)
                time.sleep(3600)  # noqa: ASYNC251
            case "aclose":
                self._hang = True
                await asyncio.sleep(3600)
            case _:
                while True:
                    try:
                        await asyncio.sleep(3600)
                    except asyncio.CancelledError:
                        continue
        raise AssertionError
