"""Map the errors of Supabase Storage to `RunError`, with a sentence and a cure.

Storage returns nearly every error with HTTP 400; the status that counts is in the body, as is a word for it. Gateways in
front of it have errors of their own, in JSON or HTML: they say nothing about the bucket. All codes begin with `storage_`.
"""

import base64
import json
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any, cast

import httpx
from storage3.exceptions import StorageApiError

from daemon.errors import DISK_CODE, OUT_OF_FILES, Refused, Retryable, RunError, describe_shortage, not_stored

LONGEST_WAIT = timedelta(minutes=1)
"""A `Retry-After` beyond this is cut: by then a picture is given up, and a look costs little."""

_FOREIGN = "InternalError"
"""The word that the official client has for a body that is not Storage's."""
_LATER = {"408", "423", "425", "429"}
"""423 is a lock timeout inside Storage, 429 too many connections (measured)."""


def translated(error: StorageApiError, bucket: str, key: str = "") -> RunError:
    """Map an error response: `Refused` where the same upload would be refused again, else `Retryable`.

    Args:
        error: As the official client raises it, or `parsed` makes it.
        bucket: Its name.
        key: The API key, of which only its role is read.
    """
    status, word, response = str(error.status), error.code, _response(error)
    data = {"answer": error.message[:200]}
    if word == _FOREIGN:
        return _of_gateway(status, response, data)
    if status in _LATER or status.startswith("5"):
        return _away(status, response, data)
    code, message, hint = "storage_refused", f"Storage refused the image (status {status}).", ""
    public = public_key(key)
    if public is not None and (word == "Bucket not found" or status in {"401", "403"}):
        return _wrong_key(public, data)
    if word == "Bucket not found":
        code, message = "storage_no_bucket", f"The storage bucket {bucket!r} does not exist."
        hint = "Run image-jobs migrate. If the bucket is there, check that the key is the service role's."
    elif status in {"401", "403"} or word == "InvalidJWT":
        return _wrong_key(None, data)
    elif word == "not_found":
        code, message = "storage_missing", "The image is no longer in storage."
        hint = "Choose another image, or make it anew."
    elif status == "413":
        code, message = "storage_too_large", f"The image is larger than the bucket {bucket!r} allows."
        hint = "Ask for a smaller size, or raise the bucket's file size limit."
    elif status == "415":
        code, message = "storage_type_refused", f"The bucket {bucket!r} does not take this type of image."
        hint = "Add the type to the bucket's allowed MIME types."
    return Refused(message, code=code, hint=hint or "The run's events have Storage's own words.", data=data)


def unreachable(error: Exception, url: str) -> Retryable:
    """Map a transport error: a timeout, or a server that cannot be reached."""
    if isinstance(error, httpx.TimeoutException):
        return Retryable(
            "Storage did not answer in time.",
            code="storage_timeout",
            hint="",
        )
    return Retryable(
        "Storage cannot be reached.",
        code="storage_unreachable",
        hint=f"Check SUPABASE_URL ({httpx.URL(url).host}) and the network.",
        data={"reason": f"{type(error).__name__}: {error}"[:200]},
    )


def not_understood(error: Exception) -> Retryable:
    """Map a response of 200 that is not Storage's: a maintenance page."""
    return Retryable(
        "Something in front of Storage answered in its place: a maintenance page, as a rule.",
        code="storage_unavailable",
        hint="If it stays so, check SUPABASE_URL.",
        data={"reason": f"{type(error).__name__}: {error}"[:200]},
    )


def of_file(error: OSError) -> RunError:
    """Map trouble with the file to upload: without file descriptors it is waited for one."""
    if error.errno not in OUT_OF_FILES:
        return not_stored(error)
    message, cure = describe_shortage(error)
    return Retryable(message, code=DISK_CODE, hint=cure, data=not_stored(error).data)


def parsed(response: httpx.Response) -> StorageApiError:
    """Parse an error response, whose body has been read, into the exception that the official client raises."""
    try:
        response.raise_for_status()
    except httpx.HTTPStatusError as cause:
        try:
            body = response.json()
            error = StorageApiError(body["message"], body["error"], body["statusCode"])
        except (ValueError, TypeError, KeyError):
            error = StorageApiError(response.text[:200], _FOREIGN, response.status_code)
        error.__cause__ = cause
        return error
    return StorageApiError(response.text[:200], _FOREIGN, response.status_code)


def retry_after(value: str, now: datetime | None = None) -> timedelta | None:
    """Read a `Retry-After`: seconds, or a date (RFC 9110, 10.2.3). None for anything else.

    Returns:
        Between nothing and `LONGEST_WAIT`.
    """
    text = value.strip()
    if text.isascii() and text.isdigit():
        seconds = float(text[:9])
    else:
        try:
            at = parsedate_to_datetime(text)
        except (ValueError, OverflowError):
            return None
        at = at if at.tzinfo is not None else at.replace(tzinfo=UTC)
        seconds = (at - (now or datetime.now(UTC))).total_seconds()
    return timedelta(seconds=min(max(0.0, seconds), LONGEST_WAIT.total_seconds()))


def public_key(key: str) -> str | None:
    """Return the name of a key that everybody may have, by what it says of itself; None for any other.

    A JWT names its role, a newer key has it as its prefix (https://supabase.com/docs/guides/api/api-keys).
    """
    if key.startswith("sb_publishable_"):
        return "publishable"
    parts = key.split(".")
    if len(parts) != 3:
        return None
    try:
        claims: object = json.loads(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
    except ValueError:
        return None
    role = cast("dict[str, object]", claims).get("role") if isinstance(claims, dict) else None
    return role if isinstance(role, str) and role in {"anon", "authenticated"} else None


def _of_gateway(status: str, response: httpx.Response | None, data: dict[str, Any]) -> RunError:
    """Map a response that is not in Storage's words. A gateway's are not shown: they may be a page of HTML."""
    if response is None or not _is_json(response):
        data = {}
    if status == "413":
        return Refused(
            "A gateway in front of Storage does not let an image of this size pass (status 413).",
            code="storage_too_large",
            hint="Raise its limit for request bodies (nginx: client_max_body_size), or ask for a smaller size.",
            data=data,
        )
    if status == "401":
        return _wrong_key(None, data)
    if status.startswith("3"):
        return Refused(
            f"SUPABASE_URL leads elsewhere (status {status}).",
            code="storage_refused",
            hint="Set SUPABASE_URL to the address at which the project itself answers.",
            data=data,
        )
    return _away(status, response, data)


def _is_json(response: httpx.Response) -> bool:
    try:
        response.json()
    except ValueError:
        return False
    return True


def _away(status: str, response: httpx.Response | None, data: dict[str, Any]) -> Retryable:
    return Retryable(
        f"Storage does not work at the moment (status {status}).",
        code="storage_unavailable",
        hint="",
        retry_in=None if response is None else retry_after(response.headers.get("retry-after", "")),
        data=data,
    )


def _wrong_key(public: str | None, data: dict[str, Any]) -> Refused:
    message = "Storage does not accept the daemon's key."
    if public is not None:
        message = f"SUPABASE_SERVICE_ROLE_KEY is this project's {public} key, which may not write to Storage."
        if public == "authenticated":
            message = "SUPABASE_SERVICE_ROLE_KEY is a user's token, which may not write to Storage."
    return Refused(
        message,
        code="storage_unauthorized",
        hint="Set SUPABASE_SERVICE_ROLE_KEY to the service role or secret key of this project.",
        data=data,
    )


def _response(error: BaseException) -> httpx.Response | None:
    """Return the response that an error of the official client came of; it is in the chain of its causes."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, httpx.HTTPStatusError):
            return seen.response
        seen = seen.__cause__ or seen.__context__
    return None
