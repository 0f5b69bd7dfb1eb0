"""Tell operators of alerts: post each to IMAGE_JOBS_ALERT_URL, once when it opens and once when it closes.

The database says what is wrong (`image_jobs.alerts`) and leases each notice to one daemon (`sql/schema/51_alerts.sql`). A killed
daemon's is leased again, with the same id: at least once.
"""

import asyncio
from datetime import datetime
from http import HTTPStatus
from typing import Any

import httpx
import structlog
from pydantic import SecretStr

from daemon import http_clients
from daemon.queue.client import AlertNotice, Queue
from daemon.queue.outage import Outage

log = structlog.stdlib.get_logger()

INTERVAL = 5.0
"""Seconds between two looks."""
AT_ONCE = 5
"""Notices that are leased at a time: they are sent one after the other, and all within the lease, which is a minute."""
TIMEOUT = 10.0
"""Seconds for one notice."""
_ESCAPES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})
"""In Slack and its kin these three make links and mentions."""


class Alerts:
    """Posts notices, in the background.

    The address is the operator's own, so it may be any; it is a secret, so a redirect is not followed, and no error is logged
    with more than its class.

    Args:
        queue: The database.
        url: Where to post.
        project: Names this installation in the text.
    """

    def __init__(self, queue: Queue, url: SecretStr, *, project: str) -> None:
        self._queue = queue
        self._url = url
        self._project = project
        self._text_alone = False
        self._outage = Outage("alerts.not_taken", "alerts.taken")

    async def run(self) -> None:
        """Post what is due until cancelled."""
        while True:
            try:
                await self.send()
            except Exception as error:  # noqa: BLE001 - it comes round again, whatever the database says
                self._outage.failed(error)
            else:
                self._outage.passed()
            await asyncio.sleep(INTERVAL)

    async def send(self) -> None:
        """Post the notices that are due now; those that cannot be posted are due again later."""
        notices = await self._queue.take_alert_notices(AT_ONCE)
        if not notices:
            return
        async with http_clients.client(timeout=TIMEOUT, follow_redirects=False) as client:
            for notice in notices:
                reason = await self._post(client, notice)
                await self._queue.finish_alert_notice(notice, done=reason is None)
                fields = {"alert": notice.name, "subject": notice.subject, "state": notice.state}
                if reason is None:
                    log.info("alert.sent", **fields)
                else:
                    log.warning("alert.not_sent", **fields, reason=reason, consequence="it is tried again")

    async def _post(self, client: httpx.AsyncClient, notice: AlertNotice) -> str | None:
        """Post one notice. Returns why it did not arrive; None if it did."""
        body = self._body(notice)
        try:
            async with asyncio.timeout(TIMEOUT):
                if not self._text_alone:
                    status = await self._status(client, notice, body)
                    if status != HTTPStatus.BAD_REQUEST:
                        return _reason(status)
                # Google Chat refuses what it does not know.
                status = await self._status(client, notice, {"text": body["text"]})
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            return type(error).__name__
        self._text_alone = _reason(status) is None
        return _reason(status)

    async def _status(self, client: httpx.AsyncClient, notice: AlertNotice, body: dict[str, Any]) -> int:
        headers = {"Idempotency-Key": _key(notice)}
        async with client.stream("POST", self._url.get_secret_value(), json=body, headers=headers) as response:
            return response.status_code

    def _body(self, notice: AlertNotice) -> dict[str, Any]:
        if notice.state == "open":
            said = f"{notice.severity.upper()} {self._project}: {notice.sentence}\n{notice.cure}"
        else:
            said = f"CLOSED {self._project}: {notice.sentence}\nIt was open {_span(notice)}."
        return {
            "text": said.translate(_ESCAPES),
            "id": _key(notice),
            "state": notice.state,
            "name": notice.name,
            "subject": notice.subject,
            "severity": notice.severity,
            "since": notice.since,
            "closed": notice.closed if notice.state == "closed" else None,
        }


def _key(notice: AlertNotice) -> str:
    """Return the same for the same news, however often it is sent."""
    return f"{notice.id}:{notice.state}"


def _reason(status: int) -> str | None:
    return None if httpx.codes.is_success(status) else f"HTTP {status}"


def _span(notice: AlertNotice) -> str:
    """Return how long an alert was open."""
    minutes = (
        datetime.fromisoformat(notice.closed or notice.since) - datetime.fromisoformat(notice.since)
    ).total_seconds() / 60
    if minutes < 1:
        return "less than a minute"
    return f"{minutes:.0f} minutes" if minutes < 120 else f"{minutes / 60:.0f} hours"
