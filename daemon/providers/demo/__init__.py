"""Generate images without a key and for nothing: `demo:painter` paints a landscape from the prompt, the size and the seed.

Read `provider.py` first. The painter can also fail as real providers do, when `metadata.demo` says so:

    {"fail": "The brush broke."}    fails, and is retried; with "final": true it is not
    {"refuse": true}                refuses the prompt; with a reason: {"refuse": "No foxes."}
    {"throttle": 5}                 is rate limited for 5 s; with "block": true for every run
    {"hang": true}                  never returns
    {"slow": 20}                    takes 20 s to paint
    {"submit": 10}                  takes a job, whose image is ready 10 s later
    {"noop": true}                  returns a tiny image at once, for load tests
    {"cost": 0.04}                  reports that cost, in USD

`"times": 2` limits `fail` and `refuse` to the first two attempts, and `throttle` to the first two requests of a run
(a throttled request gives its attempt back, so these are counted here, by this process).
"""

from daemon.providers import Provider
from daemon.providers.demo.models import MODELS
from daemon.settings import Settings

__all__ = ["MODELS", "SETTING", "create"]

SETTING = "IMAGE_JOBS_DEMO"


def create(settings: Settings) -> Provider | None:
    """Create the painter; None without `IMAGE_JOBS_DEMO`."""
    if not settings.demo:
        return None
    from daemon.providers.demo.provider import Painter

    return Painter()
