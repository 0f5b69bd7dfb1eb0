"""A workflow as a client of Supabase reads it: its nodes over REST, their changes over Realtime."""

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
from daemon.http_clients import check_environment
from daemon.http_clients import client as http_client

PAGE = 500
TIMEOUT = 20
"""Seconds for a response."""

Rows: TypeAlias = list[dict[str, Any]]


class Away(Exception):
    """The server cannot be reached, or does not respond. The message is the reason, without a full stop."""


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
        check_environment()
        self._url = url.rstrip("/")
        self._key = key
        self._token = token or key
        self._workflow = workflow

    async def rows(self) -> Rows:
        """Fetch all nodes of the workflow, page by page.

        Raises:
            Away: If the server cannot be reached, or responds with an error.
            ImageJobsError: If the key or the token is not accepted.
        """
        found: Rows = []
        async with self._client() as client:
            while True:
                query = {
                    "select": "id,version,node_data",
                    "workflow_id": f"eq.{self._workflow}",
                    "id": f"gt.{found[-1]['id'] if found else ''}",
                    "order": "id",
                    "limit": str(PAGE),
                }
                page = await self._get(client, "workflow_nodes", query)
                found += page
                if len(page) < PAGE:
                    return found

    async def reasons(self) -> dict[str, str]:
        """Fetch why pending runs of the workflow wait: sentences by their ids, of the first thousand.

        Raises:
            Away, ImageJobsError: As `rows`.
        """
        async with self._client() as client:
            states = await self._get(client, "image_provider_status", {"select": "*"})
            closed = {
                ":".join(filter(None, (each["provider"], each["model"]))): each["sentence"]
                for each in states
                if each["sentence"]
            }
            own = {f"{each['provider']}:{each['model']}" for each in states if each["model"]}
            if not closed:
                return {}
            query = {
                "select": "id,processor,routed_to",
                "subject_id": f"eq.{self._workflow}",
                "status": "eq.pending",
                "limit": "1000",
            }
            routes = {run["id"]: run["routed_to"] or run["processor"] for run in await self._get(client, "runs", query)}
        names = {run: route if route in own else route.partition(":")[0] for run, route in routes.items()}
        return {run: closed[name] for run, name in names.items() if name in closed}

    def _client(self) -> httpx.AsyncClient:
        headers = {"apikey": self._key, "authorization": f"Bearer {self._token}"}
        return http_client(base_url=self._url, headers=headers, timeout=TIMEOUT)

    async def _get(self, client: httpx.AsyncClient, table: str, query: dict[str, str]) -> Rows:
        try:
            response = await client.get(f"/rest/v1/{table}", params=query)
            response.raise_for_status()
            rows: Rows = response.json()
        except httpx.HTTPStatusError as error:
            message = f"{self._url} answers {error.response.status_code} {_message(error.response)}".rstrip(" .")
            if error.response.status_code in (401, 403):
                raise ImageJobsError(f"{message}.", self._cure()) from error
            raise Away(message) from error
        except (httpx.HTTPError, json.JSONDecodeError) as error:
            raise Away(f"{self._url} does not answer ({type(error).__name__})") from error
        return rows

    @asynccontextmanager
    async def joined(self) -> AsyncGenerator["Changes", None]:
        """Subscribe to the workflow's topic for as long as the context lasts.

        The client's own reconnecting is switched off: by default it gives up for ever after five tries, and the state
        that it reports does not show it. The end of a connection ends `Changes`, and the caller joins anew.

        Raises:
            Away: If the server cannot be reached.
            ImageJobsError: If it does not let us in.
        """
        client = AsyncRealtimeClient(f"{self._url}/realtime/v1", self._key, auto_reconnect=False)
        await client.set_auth(self._token)
        changes = Changes()
        try:
            await self._connect(client)
            # Private, but an error in the client's own code ends this task, too, and nothing else reports it.
            listening = cast("asyncio.Task[None]", client._listen_task)  # noqa: SLF001  # pyright: ignore[reportPrivateUsage, reportUnknownMemberType]
            listening.add_done_callback(changes.on_end)
            channel = client.channel(f"workflow:{self._workflow}", {"config": _PRIVATE})
            await channel.on_broadcast("nodes_changed", changes.on_message).subscribe(changes.on_state)
            await self._wait_joined(channel, changes)
            yield changes
        finally:
            await client.close()

    async def _connect(self, client: AsyncRealtimeClient) -> None:
        try:
            await client.connect()
        except InvalidStatus as error:
            message = f"{self._url} answers {error.response.status_code}"
            if error.response.status_code in (401, 403):
                raise ImageJobsError(f"{message} to the key.", self._cure()) from error
            raise Away(message) from error
        except ImportError as error:
            raise Misconfigured(
                "The environment names a SOCKS proxy, for which the package python-socks is missing.",
                "Run pip install python-socks, use an http proxy, or unset the variable.",
            ) from error
        except (OSError, WebSocketException) as error:
            raise Away(f"{self._url} cannot be reached ({type(error).__name__})") from error

    async def _wait_joined(self, channel: AsyncRealtimeChannel, changes: "Changes") -> None:
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
"""Realtime's error codes that a retry does not change."""


class Changes:
    """The messages of a channel, in order, until the connection ends."""

    def __init__(self) -> None:
        self._received: asyncio.Queue[Rows | Away] = asyncio.Queue()

    async def next(self) -> Rows:
        """Wait for the next message, and return its nodes.

        Raises:
            Away: If the connection has ended.
        """
        received = await self._received.get()
        if isinstance(received, Away):
            raise received
        return received

    def on_message(self, message: BroadcastPayload) -> None:
        """Called by the client for each `nodes_changed`."""
        self._received.put_nowait(message["payload"]["nodes"])

    def on_state(self, state: RealtimeSubscribeStates, error: Exception | None) -> None:
        """Called by the client when its channel is joined, and when it no longer is."""
        if state != RealtimeSubscribeStates.SUBSCRIBED:
            self._received.put_nowait(Away(_reason(error) if error else state.value.lower()))

    def on_end(self, listening: asyncio.Task[None]) -> None:
        """Called when the client's reading task has ended, with or without an error."""
        if not listening.cancelled():
            error = listening.exception()
            self._received.put_nowait(Away(f"the connection has ended ({error or 'closed by the server'})"))


def _reason(error: Exception) -> str:
    """Return why a channel is not joined. The client wraps the server's reason in JSON."""
    try:
        details = json.loads(str(error))
    except json.JSONDecodeError:
        return str(error)
    return str(details.get("reason") or details.get("message") or error).rstrip(".")


def _message(response: httpx.Response) -> str:
    try:
        return str(response.json()["message"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return response.reason_phrase
