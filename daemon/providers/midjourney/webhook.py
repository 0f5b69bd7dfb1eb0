"""Sign the webhooks of a midjourney-proxy, so that the database can verify that a provider job is ours.

The proxy signs nothing itself. But it repeats a job's `state` in each webhook, so `state` is signed: see
`image_jobs.verified_delivery` in `sql/schema/70_webhook_signatures.sql`.
"""

import hmac
from dataclasses import dataclass, field
from typing import Self
from urllib.parse import quote

from daemon.log import MASK
from daemon.settings import Settings


@dataclass(frozen=True, slots=True)
class Webhook:
    """An address for webhooks.

    Args:
        url: The proxy posts the task there at each change.
        key: Signs `state`; None for an address that a caller named, which gets no signature.
    """

    url: str = field(repr=False)
    key: bytes | None = field(default=None, repr=False)

    @classmethod
    def of(cls, settings: Settings) -> Self | None:
        """Return the database's own receiver, `webhook_midjourney`; None without its address, the anon key or a secret."""
        secrets = settings.webhook_secrets.get("midjourney")
        if not secrets or settings.supabase_url is None or settings.anon_key is None:
            return None
        apikey = quote(settings.anon_key.get_secret_value().strip(), safe="")
        url = f"{settings.supabase_url.rstrip('/')}/rest/v1/rpc/webhook_midjourney?apikey={apikey}"
        return cls(url, secrets[0].get_secret_value().encode())

    @property
    def ours(self) -> bool:
        """Whether the webhooks are sent to the database."""
        return self.key is not None

    @property
    def shown(self) -> str:
        """The address, for the audit trail."""
        return f"{self.url.partition('?')[0]}?apikey={MASK}" if self.ours else self.url

    def state(self, name: str) -> str:
        """Return the `state` of a job: `<name>.<hex HMAC-SHA256 of the name>`, or the name alone without a key."""
        return name if self.key is None else f"{name}.{hmac.digest(self.key, name.encode(), 'sha256').hex()}"

    def shown_state(self, name: str) -> str:
        """Return `state` for the audit trail, without the signature, with which webhooks could be forged."""
        return f"{name}.{MASK}" if self.ours else name


def job_name_in(state: str | None) -> str | None:
    """Return the name in a job's `state`, whichever key signed it: secrets are replaced while jobs are running."""
    return None if state is None else state.partition(".")[0]
