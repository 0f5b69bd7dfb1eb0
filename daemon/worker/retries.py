"""How long things may take: with a provider, between two checks of an order, until a webhook is missed."""

from dataclasses import dataclass
from datetime import timedelta

from daemon.providers import Submitted
from daemon.queue import Claimed


@dataclass(frozen=True, slots=True)
class Policy:
    """See the settings of the same names; a webhook is waited for at most until a run is given up (`poll_timeout`).
    `webhooks` are the providers whose webhooks are verified."""

    run_timeout: timedelta
    poll_interval: timedelta
    poll_timeout: timedelta
    webhook_wait: timedelta
    webhooks: frozenset[str]
    strict_models: bool
    max_image_bytes: int

    def first_check(self, order: Submitted) -> timedelta:
        """From the order to the first question about it, if no webhook comes before."""
        if order.webhook:
            return self.webhook_wait
        return min(order.check_in or self.poll_interval, self.poll_timeout)

    def next_check(self, run: Claimed, *, webhook: bool) -> timedelta:
        """From one question to the next. With `webhook` the provider tells what happens: it is not asked before."""
        if not webhook:
            return self.poll_interval
        left = self.poll_timeout - (run.submitted_ago or timedelta(0))
        return max(min(self.webhook_wait, left), timedelta(0))
