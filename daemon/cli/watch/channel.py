"""A workflow as a client of Supabase meets it: its nodes over REST, their changes over Realtime."""

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any, TypeAlias, cast
from uuid import UUID

import httpx
from realtime import AsyncRealtimeChannel, AsyncRealtimeClient, RealtimeSubscribeStates
from realtime.types import BroadcastPayload
from websockets.exceptions import InvalidStatus, WebSocketException

from daemon.errors import ImageJobsError, Misconfigured

PAGE = 500
TIMEOUT = 20
"""Seconds for an answer."""

Rows: TypeAlias = list[dict[str, Any]]


class Away(Exception):
    """Nobody is there just now, or nobody who can answer. The message says what happened, without a full stop."""


class Channel:
    """One workflow.

    Args:
        url: The project's address.
        key: Of the project: service role or secret, or with a `token` anon or publishable.
        token: Of a member who is signed in.
        workflow: Its id.

    Raises:
        Misconfigured: If `url` is no address.
    """

    def __init__(self, url: str, key: str, token: str | None, workflow: UUID) -> None:
        if not url.startswith(("http://", "https://")):
            raise Misconfigured("SUPABASE_URL is no address.", "It begins with https://.")
        self._url = url.rstrip("/")
        self._key = key
        self._token = token or key
        self._workflow = workflow

    async def rows(self) -> Rows:
        """All nodes of the workflow, as they are now.

        Raises:
            Away: If that could not be found out.
            ImageJobsError: If the key or the token is not accepted.
        """
        headers = {"apikey": self._key, "authorization": f"Bearer {self._token}"}
        found: Rows = []
        async with httpx.AsyncClient(base_url=self._url, headers=headers, timeout=TIMEOUT) as client:
            while True:
                query = {
                    "select": "id,version,node_data",
                    "workflow_id": f"eq.{self._workflow}",
                    "id": f"gt.{found[-1]['id'] if found else ''}",
                    "order": "id",
                    "limit": str(PAGE),
                }
                try:
                    answer = await client.get("/rest/v1/workflow_nodes", params=query)
                    answer.raise_for_status()
                    page: Rows = answer.json()
                except httpx.HTTPStatusError as error:
                    said = f"{self._url} answers {error.response.status_code} {_message(error.response)}".rstrip(" .")
                    if error.response.status_code in (401, 403):
                        raise ImageJobsError(f"{said}.", self._cure()) from error
                    raise Away(said) from error
                except (httpx.HTTPError, json.JSONDecodeError) as error:
                    raise Away(f"{self._url} does not answer ({type(error).__name__})") from error
                found += page
                if len(page) < PAGE:
                    return found

    @asynccontextmanager
    async def joined(self) -> AsyncGenerator["Changes", None]:
        """What is said about the workflow from now on.

        The client's own reconnecting is switched off: by default it gives up for ever after five tries, and what it
        tells about its state is not enough to know that it has. Whatever ends a connection ends `Changes`, and whoever
        reads them joins anew.

        Raises:
            Away: If the server cannot be reached.
            ImageJobsError: If it does not let us in.
        """
        client = AsyncRealtimeClient(f"{self._url}/realtime/v1", self._key, auto_reconnect=False)
        await client.set_auth(self._token)
        changes = Changes()
        try:
            await self._connect(client)
            # Private, but an error in the client's own code ends this task, too, and nothing else would tell.
            listening = cast("asyncio.Task[None]", client._listen_task)  # noqa: SLF001  # pyright: ignore[reportPrivateUsage, reportUnknownMemberType]
            listening.add_done_callback(changes.on_end)
            channel = client.channel(f"workflow:{self._workflow}", {"config": _PRIVATE})
            await channel.on_broadcast("nodes_changed", changes.on_message).subscribe(changes.on_state)
            await self._let_in(channel, changes)
            yield changes
        finally:
            await client.close()

    async def _connect(self, client: AsyncRealtimeClient) -> None:
        try:
            await client.connect()
        except InvalidStatus as error:
            said = f"{self._url} answers {error.response.status_code}"
            if error.response.status_code in (401, 403):
                raise ImageJobsError(f"{said} to the key.", self._cure()) from error
            raise Away(said) from error
        except (OSError, WebSocketException) as error:
            raise Away(f"{self._url} cannot be reached ({type(error).__name__})") from error

    async def _let_in(self, channel: AsyncRealtimeChannel, changes: "Changes") -> None:
        if channel.is_joined:
            return
        try:
            await changes.next()
        except Away as away:
            if str(away).startswith(_REFUSALS):
                raise ImageJobsError(f"Workflow {self._workflow}: {away}.", self._cure()) from away
            raise
        raise Away("the server has closed the channel")

    def _cure(self) -> str:
        if self._token == self._key:
            return "Check SUPABASE_SERVICE_ROLE_KEY."
        return "Give the token of a member who is signed in: --token, or IMAGE_JOBS_TOKEN."


_PRIVATE: Any = {"broadcast": {"ack": False, "self": False}, "presence": {"key": "", "enabled": False}, "private": True}

_REFUSALS = ("Unauthorized", "InvalidJWT", "MalformedJWT")
"""Codes of Realtime's that stay as they are however often one asks."""


class Changes:
    """What is said on a channel, in order, until its end."""

    def __init__(self) -> None:
        self._heard: asyncio.Queue[Rows | Away] = asyncio.Queue()

    async def next(self) -> Rows:
        """The nodes of the next message.

        Raises:
            Away: If there will be none.
        """
        heard = await self._heard.get()
        if isinstance(heard, Away):
            raise heard
        return heard

    def on_message(self, message: BroadcastPayload) -> None:
        """The client calls it for each `nodes_changed`."""
        self._heard.put_nowait(message["payload"]["nodes"])

    def on_state(self, state: RealtimeSubscribeStates, error: Exception | None) -> None:
        """The client calls it when its channel is joined, and when it no longer is."""
        if state != RealtimeSubscribeStates.SUBSCRIBED:
            self._heard.put_nowait(Away(_reason(error) if error else state.value.lower()))

    def on_end(self, listening: asyncio.Task[None]) -> None:
        """The connection is over, one way or another."""
        if not listening.cancelled():
            error = listening.exception()
            self._heard.put_nowait(Away(f"the connection has ended ({error or 'closed by the server'})"))


def _reason(error: Exception) -> str:
    """Of why a channel is not joined: the client wraps what the server says in JSON."""
    try:
        said = json.loads(str(error))
    except json.JSONDecodeError:
        return str(error)
    return str(said.get("reason") or said.get("message") or error).rstrip(".")


def _message(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["message"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return answer.reason_phrase
