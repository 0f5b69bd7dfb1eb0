"""A process that is a daemon several times, one after the other: `LIVES` times, each until a signal.

So a test can stop fifty daemons without fifty starts of Python.
"""

import asyncio
import os

from daemon import log
from daemon.cli.console import load_settings
from daemon.service import serve

if __name__ == "__main__":
    settings = load_settings(beside_dev=False)
    log.configure(settings.log_format)
    for _ in range(int(os.environ["LIVES"])):
        asyncio.run(serve(settings))
