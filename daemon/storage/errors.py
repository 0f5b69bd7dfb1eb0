"""What Supabase Storage says when it does not work, in sentences with a cure.

Storage answers nearly every error with HTTP 400; the status that counts is in the body, as is a word for it. Proxies
before it answer in their own way. All codes begin with `storage_`.
"""

import json

import httpx
from storage3.exceptions import StorageApiError

from daemon.errors import Refused, Retryable, RunError


def translated(error: StorageApiError, bucket: str) -> RunError:
    """An answer of the server's: `Refused` where the same upload would be refused again, else `Retryable`."""
    status, word = str(error.status), error.code
    answer = {"answer": error.message[:200]}
    if status in {"408", "429"} or status.startswith("5"):
        return Retryable(
            f"Storage does not work at the moment (status {status}).",
            code="storage_unavailable",
            hint="Requeue the run once Supabase Storage works again.",
            data=answer,
        )
    code, message, hint = "storage_refused", f"Storage refused the image (status {status}).", ""
    if word == "Bucket not found":
        code, message = "storage_no_bucket", f"The storage bucket {bucket!r} does not exist."
        hint = "Run image-jobs migrate. If the bucket is there, check that the key is the service role's."
    elif status in {"401", "403"} or word == "InvalidJWT":
        code, message = "storage_unauthorized", "Storage does not accept the daemon's key."
        hint = "Set SUPABASE_SERVICE_ROLE_KEY to the service role or secret key of this project."
    elif word == "not_found":
        code, message = "storage_missing", "The image is no longer in storage."
        hint = "Choose another image, or make it anew."
    elif status == "413":
        code, message = "storage_too_large", f"The image is larger than the bucket {bucket!r} allows."
        hint = "Ask for a smaller size, or raise the bucket's file size limit."
    elif status == "415":
        code, message = "storage_type_refused", f"The bucket {bucket!r} does not take this type of image."
        hint = "Add the type to the bucket's allowed MIME types."
    return Refused(message, code=code, hint=hint or "The run's events have Storage's own words.", data=answer)


def unreachable(error: httpx.HTTPError, url: str) -> Retryable:
    """No answer, or none from Storage."""
    if isinstance(error, httpx.TimeoutException):
        return Retryable(
            "Storage did not answer in time.",
            code="storage_timeout",
            hint="Requeue the run once Supabase Storage answers again.",
        )
    return Retryable(
        "Storage cannot be reached.",
        code="storage_unreachable",
        hint=f"Check SUPABASE_URL ({httpx.URL(url).host}) and the network, then requeue the run.",
        data={"reason": f"{type(error).__name__}: {error}"[:200]},
    )


def parsed(body: bytes, http_status: int) -> StorageApiError:
    """The same error that the client raises, for an answer that was read without it."""
    try:
        answer = json.loads(body)
        return StorageApiError(answer["message"], answer["error"], answer["statusCode"])
    except (ValueError, TypeError, KeyError):
        return StorageApiError(body[:200].decode(errors="replace"), "InternalError", http_status)
