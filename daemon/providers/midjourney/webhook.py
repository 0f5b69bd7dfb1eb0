"""Where a midjourney-proxy sends the webhooks of an order, and how the database knows that the order is ours.

The proxy signs nothing. But it repeats an order's `state` in every one, so that is signed, by us: see
`private.verified_delivery` in `sql/schema/70_webhook_signatures.sql`.
"""

import hmac
from dataclasses import dataclass, field
from typing import Self
from urllib.parse import quote

from daemon.log import MASK
from daemon.settings import Settings


@dataclass(frozen=True, slots=True)
class Hook:
    """An address for webhooks.

    Args:
        url: The proxy posts the task to it at each change.
        key: Signs the state; None for an address that a caller named, which gets no token of ours.
    """

    url: str = field(repr=False)
    key: bytes | None = field(default=None, repr=False)

    @classmethod
    def of(cls, settings: Settings) -> Self | None:
        """The database's own receiver, `webhook_midjourney`; None without its address, the anon key or a secret."""
        secrets = settings.webhook_secrets.get("midjourney")
        if not secrets or settings.supabase_url is None or settings.anon_key is None:
            return None
        apikey = quote(settings.anon_key.get_secret_value().strip(), safe="")
        url = f"{settings.supabase_url.rstrip('/')}/rest/v1/rpc/webhook_midjourney?apikey={apikey}"
        return cls(url, secrets[0].get_secret_value().encode())

    @property
    def ours(self) -> bool:
        """Whether they come to the database."""
        return self.key is not None

    @property
    def shown(self) -> str:
        """The address, for the audit trail."""
        return f"{self.url.partition('?')[0]}?apikey={MASK}" if self.ours else self.url

    def state(self, name: str) -> str:
        """What an order of that name is sent with: `<name>.<hex HMAC-SHA256 of the name>`, or the name alone."""
        return name if self.key is None else f"{name}.{hmac.digest(self.key, name.encode(), 'sha256').hex()}"

    def shown_state(self, name: str) -> str:
        """The same for the audit trail: whoever can read it must not be able to speak for the proxy."""
        return f"{name}.{MASK}" if self.ours else name


def name_in(state: str | None) -> str | None:
    """The name that an order was made with, whatever key signed it: secrets are replaced while orders are out."""
    return None if state is None else state.partition(".")[0]
