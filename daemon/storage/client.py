"""store: Supabase Storage, through its official client.

What that client leaves to its caller, and what is therefore done here: tries (it has none), time limits, a sentence
for each of its errors, and a connection of its own for each request. For when the server refuses an upload early it
leaves the rest of the body unread, and whoever gets the connection next waits for its time limit. (A header
`connection: close` would not do: then the server cuts the upload, and its reason is lost.)
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Self, TypeVar
from urllib.parse import quote, unquote, urlsplit

import httpx
from storage3 import AsyncStorageClient
from storage3.exceptions import StorageApiError
from storage3.types import FileOptions
from supabase import AsyncClient, AsyncClientOptions, AsyncSupabaseException, acreate_client
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_exponential_jitter

from daemon.errors import ImageJobsError, Refused, Retryable
from daemon.storage_errors import parsed, translated, unreachable

T = TypeVar("T")

TRIES = 3
YEAR = "31536000"
"""Seconds a browser may keep an image: its URL changes with its bytes."""
_CHUNK = 1 << 20


class ClaimGone(Exception):
    """The run was taken away before its picture was written: nothing was."""


@dataclass(frozen=True, slots=True)
class StoredObject:
    """What lies in storage. `size` in bytes; `metadata` is what `upload` was given."""

    key: str
    content_type: str
    size: int
    metadata: Mapping[str, str]


class Storage:
    """One bucket. An async context manager; usable by many tasks at once.

    Args:
        url: The project's address.
        key: Service role or secret key.
        bucket: Its name.
        timeout: For each silence of the server's, not for a whole transfer.
        first_wait: Before the second try; doubled before the third, with jitter.
    """

    def __init__(
        self,
        url: str,
        key: str,
        *,
        bucket: str,
        timeout: timedelta = timedelta(seconds=60),
        first_wait: timedelta = timedelta(seconds=1),
    ) -> None:
        self.uploads_tried = 0
        self.uploads_failed = 0
        self._url = url.rstrip("/")
        self._key = key
        self._bucket = bucket
        self._first_wait = first_wait.total_seconds()
        seconds = timeout.total_seconds()
        self._http = httpx.AsyncClient(
            timeout=httpx.Timeout(seconds, connect=min(10, seconds), pool=min(30, seconds)),
            limits=httpx.Limits(max_connections=100, max_keepalive_connections=0),
            follow_redirects=False,  # httpx would take the header `apikey` along to wherever it is sent
        )
        self._client: AsyncClient | None = None

    async def open(self) -> None:
        """Makes the client. Connects to nothing.

        Raises:
            ImageJobsError: If the URL or the key cannot be one.
        """
        options = AsyncClientOptions(httpx_client=self._http, auto_refresh_token=False, persist_session=False)
        try:
            self._client = await acreate_client(self._url, self._key, options)
        except AsyncSupabaseException as error:
            raise ImageJobsError(
                f"Supabase cannot be used: {error}.", "Check SUPABASE_URL and SUPABASE_SERVICE_ROLE_KEY."
            ) from error

    async def aclose(self) -> None:
        """Lets go of all connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def upload(
        self,
        key: str,
        file: Path,
        *,
        content_type: str,
        metadata: Mapping[str, str] | None = None,
        may_write: Callable[[], Awaitable[bool]] | None = None,
    ) -> int:
        """Stores a file, replacing what is there; three tries.

        Args:
            key: Path in the bucket.
            file: Read in small pieces while it is sent.
            content_type: What the bucket will say that it is.
            metadata: Kept beside it; `find` gives it back.
            may_write: Asked right before each try, so that a daemon that has lost its run does not overwrite a newer
                picture.

        Returns:
            How many tries it took.

        Raises:
            ClaimGone: If `may_write` said no.
            Retryable, Refused: With a code `storage_…`; `data["uploadTries"]` says how often it was tried.
        """
        options: FileOptions = {
            "content-type": content_type,
            "cache-control": YEAR,
            "upsert": "true",
        }
        if metadata:
            options["metadata"] = dict(metadata)
        tries = 0

        async def once() -> int:
            nonlocal tries
            if may_write is not None and not await may_write():
                raise ClaimGone(key)
            tries += 1
            self.uploads_tried += 1
            try:
                await self._storage.from_(self._bucket).upload(key, file, options)
            except (StorageApiError, httpx.HTTPError):
                self.uploads_failed += 1
                raise
            return tries

        try:
            return await self._persist(once)
        except (Refused, Retryable) as error:
            error.data["uploadTries"] = tries
            raise

    async def returns(self, until: float) -> bool:
        """Waits for a server that is away; answers whether it is back.

        False at once where it is not away: what it has said of an upload stands.

        Args:
            until: When to give up, in `time.monotonic()` seconds.
        """
        if await self._answers(until):
            return False
        while time.monotonic() < until:
            await asyncio.sleep(self._first_wait)
            if await self._answers(until):
                return True
        return False

    async def public_url(self, key: str, version: str) -> str:
        """The address at which anyone can see an object; `version` makes it a new one for every content."""
        return f"{await self._storage.from_(self._bucket).get_public_url(key)}?v={version[:8]}"

    async def is_public(self, url: str) -> bool:
        """Whether a GET of `url` answers with 200; asked up to three times, as a cache may be a moment behind."""

        async def once() -> None:
            async with self._http.stream("GET", url, follow_redirects=True) as response:
                response.raise_for_status()

        try:
            await self._persist(once)
        except (Refused, Retryable):
            return False
        return True

    async def find(self, key: str) -> StoredObject | None:
        """What lies at `key`; None if nothing does.

        Raises:
            Retryable, Refused: With a code `storage_…`.
        """

        async def once() -> dict[str, Any] | None:
            try:
                return await self._storage.from_(self._bucket).info(key)
            except StorageApiError as error:
                if error.code == "not_found":
                    return None
                raise

        info = await self._persist(once)
        if info is None:
            return None
        metadata: dict[str, Any] = info.get("metadata") or {}
        return StoredObject(
            key=key,
            content_type=info.get("content_type") or "",
            size=info.get("size") or 0,
            metadata={name: str(value) for name, value in metadata.items()},
        )

    async def download(self, key: str, to: Path, *, max_bytes: int) -> None:
        """Writes an object into a file, piece by piece.

        Raises:
            Refused: `storage_missing`, or `image_too_large` if it has more than `max_bytes`.
            Retryable, Refused: With a code `storage_…`.
        """
        url = f"{self._url}/storage/v1/object/authenticated/{self._bucket}/{quote(key)}"
        headers = {"apikey": self._key, "authorization": f"Bearer {self._key}"}

        async def once() -> None:
            async with self._http.stream("GET", url, headers=headers) as response:
                if not response.is_success:
                    raise parsed(await response.aread(), response.status_code)
                size = 0
                with to.open("wb") as file:
                    async for chunk in response.aiter_bytes(_CHUNK):
                        size += len(chunk)
                        if size > max_bytes:
                            raise Refused(
                                f"The stored image is larger than {max_bytes / 1e6:.1f} MB.",
                                code="image_too_large",
                                hint="Use a smaller image as previousImage.",
                            )
                        await asyncio.to_thread(file.write, chunk)

        await self._persist(once)

    def owns(self, url: str) -> str | None:
        """The key, if `url` is the public URL of an object in our bucket; else None."""
        ours, theirs = urlsplit(self._url), urlsplit(url)
        prefix = f"{ours.path}/storage/v1/object/public/{self._bucket}/"
        if (theirs.scheme, theirs.netloc.lower()) != (ours.scheme, ours.netloc.lower()):
            return None
        if not theirs.path.startswith(prefix):
            return None
        key = unquote(theirs.path.removeprefix(prefix))
        return key if key and not {"", ".", ".."} & set(key.split("/")) else None

    async def check(self) -> None:
        """For `doctor`: the server answers, the bucket exists and is public, the key may write into it.

        Raises:
            ImageJobsError: With what is wrong and its cure.
        """
        try:
            bucket = await self._storage.get_bucket(self._bucket)
            # The server checks the right to write before it signs, and nothing is written.
            await self._storage.from_(self._bucket).create_signed_upload_url("doctor/probe.png")
        except StorageApiError as error:
            found = translated(error, self._bucket)
            raise ImageJobsError(found.message, found.hint) from error
        except httpx.HTTPError as error:
            found = unreachable(error, self._url)
            raise ImageJobsError(found.message, found.hint) from error
        if not bucket.public:
            raise ImageJobsError(
                f"The bucket {self._bucket!r} is not public: nobody can see its images.",
                "Make it public: in the dashboard under Storage, or by SQL in storage.buckets.",
            )

    async def visibility(self) -> bool | None:
        """For `doctor`: whether the bucket is public; None if it is not there, or nobody says so."""
        try:
            return (await self._storage.get_bucket(self._bucket)).public
        except (StorageApiError, httpx.HTTPError):
            return None

    @property
    def _storage(self) -> AsyncStorageClient:
        if self._client is None:
            raise RuntimeError("Storage is not open.")
        return self._client.storage

    async def _answers(self, until: float) -> bool:
        """Whether anything but an outage answers; asked once."""
        try:
            async with asyncio.timeout(max(0.0, until - time.monotonic())):
                await self._storage.get_bucket(self._bucket)
        except StorageApiError as error:
            return not isinstance(translated(error, self._bucket), Retryable)
        except (httpx.HTTPError, TimeoutError):
            return False
        return True

    async def _persist(self, once: Callable[[], Awaitable[T]]) -> T:
        """Tries `once` up to three times; its errors become ours."""

        async def attempt() -> T:
            try:
                return await once()
            except StorageApiError as error:
                raise translated(error, self._bucket) from error
            except httpx.HTTPError as error:
                raise unreachable(error, self._url) from error

        return await AsyncRetrying(
            stop=stop_after_attempt(TRIES),
            wait=wait_exponential_jitter(initial=self._first_wait, jitter=self._first_wait),
            retry=retry_if_exception_type(Retryable),
            reraise=True,
        )(attempt)
