"""Upload to and download from Supabase Storage, by its official client.

That client leaves to its caller, and so it is done here: retries (it has none), time limits, a sentence for each of its
errors, responses that are not Storage's, and a connection of its own for each request. For when the server refuses an upload early it leaves the rest of the
body unread, and the next request on that connection waits for its time limit. (A header `connection: close` would not do:
then the server cuts the upload, and its reason is lost.)
"""

import asyncio
import base64
import ssl
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Self, TypeVar
from urllib.parse import quote

import anyio
import httpx
import structlog
from storage3 import AsyncStorageClient
from storage3.exceptions import StorageApiError
from storage3.types import FileOptions

from daemon.errors import ImageJobsError, Refused, Retryable, RunError, is_disk_error
from daemon.http_clients import client
from daemon.storage.addresses import key_of, may_name
from daemon.storage.breaker import Breaker
from daemon.storage.errors import not_understood, of_file, parsed, translated, unreachable
from daemon.storage.objects import ClaimLost, FencedFile, Info, StoredObject
from daemon.storage.tries import persist

log = structlog.stdlib.get_logger()

T = TypeVar("T")

YEAR = "31536000"
"""Seconds a browser may keep an image: its URL changes with its bytes."""
PRIVATE = "600, private"
"""The same of a private image: no cache in between, and no longer than its signature. The client writes `max-age=` before it."""
_CHUNK = 1 << 20
_TRANSPORT_ERRORS = (httpx.HTTPError, ssl.SSLError, anyio.EndOfStream)
"""All that the HTTP library raises when a request fails; the last two slip through it."""

PROBE = "image-jobs-probe.png"
"""The key of the object that `probe` uploads."""
PROBE_TIMEOUT = 10.0
"""Seconds for a probe."""
VISIBILITY_TIMEOUT = 5.0
"""Seconds for a look at the bucket: a picture that is stored already may wait for it."""
VISIBILITY_AGE = 60.0
"""Seconds for which such a look holds."""
_PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
)


class Storage:
    """One bucket. An async context manager; usable by many tasks at once.

    Args:
        url: The project's address.
        key: Service role or secret key.
        bucket: Its name.
        timeout: For each silence of the server, not for a whole transfer.
        first_wait: Pause before the second try; doubled before each further one, with jitter.
        breaker: Is told of each upload; None for a bucket that no run depends on.
        private: Whether its objects are for those with a signature or a right alone, wherever the bucket says otherwise.
    """

    def __init__(
        self,
        url: str,
        key: str,
        *,
        bucket: str,
        timeout: timedelta = timedelta(seconds=60),
        first_wait: timedelta = timedelta(seconds=1),
        breaker: Breaker | None = None,
        private: bool = False,
    ) -> None:
        self.uploads_tried = 0
        self.uploads_stored = 0
        self.uploads_failed = 0
        self._url = url.rstrip("/")
        self._key = key
        self._bucket = bucket
        self._breaker = breaker
        self._private = private
        self._seen_private = False
        self._look_again = 0.0
        self._first_wait = first_wait.total_seconds()
        seconds = timeout.total_seconds()
        self._http = client(
            timeout=httpx.Timeout(seconds, connect=min(10, seconds), pool=min(30, seconds)),
            limits=httpx.Limits(max_connections=100, max_keepalive_connections=0),
            follow_redirects=False,  # httpx would take the header `apikey` along to wherever it is sent
        )
        self._opened: AsyncStorageClient | None = None

    @property
    def bucket(self) -> str:
        """The bucket's name."""
        return self._bucket

    async def open(self) -> None:
        """Create the client. Connects to nothing.

        Raises:
            ImageJobsError: If the URL or the key is malformed.
        """
        # Not by the client of `supabase`, which imports those of Auth, PostgREST and Functions, too: 0.3 s and 13 MB.
        if not self._key or not self._url.startswith(("https://", "http://")):
            wrong = "SUPABASE_URL is no https URL" if self._key else "there is no key"
            raise ImageJobsError(
                f"Supabase cannot be used: {wrong}.", "Check SUPABASE_URL and SUPABASE_SERVICE_ROLE_KEY."
            )
        headers = {"apiKey": self._key, "Authorization": f"Bearer {self._key}"}
        self._opened = AsyncStorageClient(f"{self._url}/storage/v1/", headers, http_client=self._http)

    async def aclose(self) -> None:
        """Close all connections."""
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
        private: bool = False,
        may_write: Callable[[], Awaitable[bool]] | None = None,
        may_go_on: Callable[[], bool] = lambda: True,
        patience: Callable[[], float] = lambda: 0.0,
        waiting: Callable[[], None] = lambda: None,
    ) -> int:
        """Upload a file, replacing the object of that key; at least three tries, with growing pauses between them.

        Args:
            key: Path in the bucket.
            file: Read in small pieces while it is sent.
            content_type: The object's content type.
            metadata: Stored with it; `find` returns it.
            private: Whether no cache but a browser's may keep it, and that for minutes only.
            may_write: Called right before each try (fencing): a daemon that has lost its claim must not overwrite a newer
                image.
            may_go_on: Asked before each piece of the file and before the end, without which storage keeps nothing: an upload
                ends with its lease.
            patience: Returns the seconds for which more than three tries are made, from now.
            waiting: Called once, when three tries have failed and more are made.

        Returns:
            The number of tries.

        Raises:
            ClaimLost: If `may_write` returned False.
            Retryable, Refused: With a code `storage_…`; `data["uploadTries"]` is the number of tries.
        """
        options: FileOptions = {
            "content-type": content_type,
            "cache-control": PRIVATE if private else YEAR,
            "upsert": "true",
        }
        if metadata:
            options["metadata"] = dict(metadata)
        tries = 0

        async def once() -> int:
            nonlocal tries
            if may_write is not None and not await may_write():
                raise ClaimLost(key)
            tries += 1
            self.uploads_tried += 1
            try:
                await self._mapped(partial(self._put, key, file, options, may_go_on))
            except RunError as error:
                self.uploads_failed += 1
                if self._breaker is not None:
                    self._breaker.failed(error)
                raise
            self.uploads_stored += 1
            if self._breaker is not None:
                self._breaker.passed()
            return tries

        try:
            return await self._persist(once, patience=patience, waiting=waiting)
        except (Refused, Retryable) as error:
            error.data["uploadTries"] = tries
            raise

    async def _put(self, key: str, file: Path, options: FileOptions, may_go_on: Callable[[], bool]) -> None:
        try:
            with FencedFile(file, may_go_on) as fenced:
                await self._storage.from_(self._bucket).upload(key, fenced, options)
        except OSError as error:
            if not is_disk_error(error):
                raise
            raise of_file(error) from error

    async def create_bucket(self, *, max_bytes: int) -> None:
        """Create the bucket: private, for any type. One that is there already stays as it is.

        Raises:
            Retryable, Refused: With a code `storage_…`.
        """

        async def once() -> None:
            try:
                await self._storage.create_bucket(self._bucket, options={"public": False, "file_size_limit": max_bytes})
            except StorageApiError as error:
                if error.code != "Duplicate":
                    raise

        await self._persist(once)

    async def probe(self) -> None:
        """Upload a picture of one pixel and remove it again: the bucket, the key and the store behind it work.

        Nothing less shows it. With its object store away, Storage still shows buckets and signs uploads (measured).

        Raises:
            RunError: With a code `storage_…`.
        """
        options: FileOptions = {"content-type": "image/png", "cache-control": "0", "upsert": "true"}

        async def once() -> None:
            await self._storage.from_(self._bucket).upload(PROBE, _PIXEL, options)

        try:
            async with asyncio.timeout(PROBE_TIMEOUT):
                await self._mapped(once)
                with suppress(StorageApiError, httpx.HTTPError, ValueError, TypeError):
                    await self._storage.from_(self._bucket).remove([PROBE])
        except TimeoutError as error:
            raise unreachable(httpx.ReadTimeout(str(error)), self._url) from error

    async def remove(self, keys: Sequence[str], *, bucket: str | None = None) -> None:
        """Remove objects of this bucket, or of another one. Those that are not there are no error.

        Raises:
            Retryable, Refused: With a code `storage_…`.
        """

        async def once() -> None:
            await self._storage.from_(bucket or self._bucket).remove(list(keys))

        await self._persist(once)

    async def object_url(self, key: str, version: str) -> str:
        """Return the URL of an object, the authenticated one of a private one; `version` makes it a new one for every content."""
        url = await self._storage.from_(self._bucket).get_public_url(key)
        if await self.is_private():
            url = url.replace("/object/public/", "/object/authenticated/", 1)
        return f"{url}?v={version[:8]}"

    async def is_private(self, *, at_once: bool = False) -> bool:
        """Return whether objects open for members alone: so it is set, or the bucket has been made private.

        Args:
            at_once: Look now; else once a minute. A server that says nothing leaves it as it was, public at first.
        """
        if self._private:
            return True
        if at_once or time.monotonic() >= self._look_again:
            self._look_again = time.monotonic() + VISIBILITY_AGE
            try:
                public = await self.visibility()
            except Exception as error:  # noqa: BLE001 - a look must not cost a picture that is paid for
                log.warning("bucket.not_looked_at", error=f"{type(error).__name__}: {error}")
                public = None
            if public is not None:
                self._seen_private = not public
        return self._seen_private

    async def is_public(self, url: str) -> bool:
        """Return whether a GET of `url` has status 200; up to three tries, as a cache may be a moment behind.

        A private bucket is asked once: Storage reports it as missing (measured).
        """

        async def once() -> None:
            async with self._http.stream("GET", url, follow_redirects=True) as response:
                if response.is_client_error:
                    await response.aread()
                    if (error := parsed(response)).code == "Bucket not found":
                        raise error
                response.raise_for_status()

        try:
            await self._persist(once)
        except (Refused, Retryable):
            return False
        return True

    async def find(self, key: str) -> StoredObject | None:
        """Return the object at `key`; None if there is none.

        Raises:
            Retryable, Refused: With a code `storage_…`.
        """

        async def once() -> Info | None:
            try:
                return Info.model_validate(await self._storage.from_(self._bucket).info(key))
            except StorageApiError as error:
                if error.code == "not_found":
                    return None
                raise

        info = await self._persist(once)
        if info is None:
            return None
        metadata = {name: str(value) for name, value in (info.metadata or {}).items()}
        return StoredObject(key, info.content_type or "", info.size or 0, metadata)

    async def download(self, key: str, to: Path, *, max_bytes: int, bucket: str | None = None) -> None:
        """Download an object of this bucket, or of another one, into a file, piece by piece.

        Raises:
            Refused: `storage_missing`, or `image_too_large` if it has more than `max_bytes`.
            Retryable, Refused: With a code `storage_…`.
        """
        url = f"{self._url}/storage/v1/object/authenticated/{quote(bucket or self._bucket)}/{quote(key)}"
        headers = {"apikey": self._key, "authorization": f"Bearer {self._key}"}

        async def once() -> None:
            async with self._http.stream("GET", url, headers=headers) as response:
                if not response.is_success:
                    await response.aread()
                    raise parsed(response)
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

    def owns(self, url: str, *, bucket: str | None = None) -> str | None:
        """Return the key, if `url` is the plain address of an object in our bucket, or in another one; else None."""
        return key_of(url, self._url, bucket or self._bucket)

    def may_hold(self, url: str) -> bool:
        """Return whether `url` may name anything in our bucket, or in that of sources, however it is written."""
        return may_name(url, self._url, self._bucket)

    async def check(self) -> None:
        """Check for `doctor` that the server is up, the bucket exists, and the key may write into it.

        Raises:
            ImageJobsError: With the first problem and its cure.
        """
        try:
            await self._storage.get_bucket(self._bucket)
            # The server checks the right to write before it signs, and nothing is written.
            await self._storage.from_(self._bucket).create_signed_upload_url("doctor/probe.png")
        except StorageApiError as error:
            found = translated(error, self._bucket, self._key)
            raise ImageJobsError(found.message, found.hint) from error
        except _TRANSPORT_ERRORS as error:
            found = unreachable(error, self._url)
            raise ImageJobsError(found.message, found.hint) from error
        except (ValueError, TypeError, KeyError) as error:
            found = not_understood(error)
            raise ImageJobsError(found.message, found.hint) from error

    async def visibility(self) -> bool | None:
        """Return whether the bucket is public; None if it is not there, or the server is down or takes too long."""
        try:
            async with asyncio.timeout(VISIBILITY_TIMEOUT):
                return (await self._storage.get_bucket(self._bucket)).public
        except (*_TRANSPORT_ERRORS, StorageApiError, TimeoutError, ValueError, TypeError, KeyError):
            return None

    @property
    def _storage(self) -> AsyncStorageClient:
        if self._opened is None:
            raise RuntimeError("Storage is not open.")
        return self._opened

    async def _mapped(self, once: Callable[[], Awaitable[T]]) -> T:
        """Run `once`; map its errors."""
        try:
            return await once()
        except StorageApiError as error:
            raise translated(error, self._bucket, self._key) from error
        except _TRANSPORT_ERRORS as error:
            raise unreachable(error, self._url) from error
        except (ValueError, TypeError, KeyError) as error:  # 200, and no JSON or another's
            raise not_understood(error) from error

    async def _persist(
        self,
        once: Callable[[], Awaitable[T]],
        *,
        patience: Callable[[], float] = lambda: 0.0,
        waiting: Callable[[], None] = lambda: None,
    ) -> T:
        """Run `once` until it succeeds, is refused, or has failed three times and patience is over; map its errors."""

        async def attempt() -> T:
            return await self._mapped(once)

        return await persist(attempt, first_wait=self._first_wait, patience=patience, waiting=waiting)
