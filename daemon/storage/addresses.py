"""Addresses of objects: which of ours a URL names, if it names one."""

from urllib.parse import SplitResult, unquote, urlsplit

SOURCES = "image-sources"
"""The bucket of pictures that users upload to start from; `image_jobs.storage_steps` names it like this."""
_WAYS = ("public", "authenticated", "sign")
"""How Storage's addresses of an object say who may read it."""


def key_of(url: str, project: str, bucket: str) -> str | None:
    """Return the key, if `url` is the plain address of an object in the bucket, public, authenticated or signed; else None.

    Args:
        url: Of whatever a user has written.
        project: The project's address.
        bucket: Its bucket.

    `image_jobs.pictured_workflow` reads the workflow from every URL of which this returns a key below one.
    """
    ours, theirs = urlsplit(project), _split(url)
    if theirs is None or (theirs.scheme, theirs.netloc.lower()) != (ours.scheme, ours.netloc.lower()):
        return None
    for way in _WAYS:
        prefix = f"{ours.path}/storage/v1/object/{way}/{bucket}/"
        if theirs.path.startswith(prefix):
            key = unquote(theirs.path.removeprefix(prefix))
            return key if not {"", ".", ".."} & set(key.split("/")) else None
    return None


def may_name(url: str, project: str, bucket: str) -> bool:
    """Return whether `url` may name anything in the bucket, or in that of sources, however it is written."""
    ours, theirs = urlsplit(project), _split(url)
    if theirs is None or (theirs.hostname or "").rstrip(".") != ours.hostname:
        return False
    segments = {segment.lower() for segment in unquote(theirs.path).replace("\\", "/").split("/")}
    return "storage" in segments and not segments.isdisjoint({bucket.lower(), SOURCES})


def _split(url: str) -> SplitResult | None:
    """Return the parts of a URL; None if it cannot be read."""
    try:
        return urlsplit(url)
    except ValueError:
        return None
