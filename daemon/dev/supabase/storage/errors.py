"""How the Storage server words its answers: HTTP 400 for nearly every error, the real status in the body."""

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse, Response


class Answer(JSONResponse):
    """JSON with the charset that the real server names."""

    media_type = "application/json; charset=utf-8"


class StorageError(Exception):
    """An error as the client will see it.

    Args:
        status: `statusCode` of the body.
        error: The word that storage3 calls `code`.
        message: For people.
        code: The server's own, newer word.
        http: The status of the answer.
    """

    def __init__(self, status: int, error: str, message: str, code: str, *, http: int = 400) -> None:
        super().__init__(message)
        self.body: Mapping[str, Any] = {"statusCode": str(status), "error": error, "message": message, "code": code}
        self.http = http

    def answer(self) -> Response:
        return Answer(self.body, self.http)


def no_bucket() -> StorageError:
    return StorageError(404, "Bucket not found", "Bucket not found", "NoSuchBucket")


def no_object() -> StorageError:
    return StorageError(404, "not_found", "Object not found", "NoSuchKey")


def duplicate(code: str = "KeyAlreadyExists") -> StorageError:
    return StorageError(409, "Duplicate", "The resource already exists", code)


def not_empty() -> StorageError:
    return StorageError(409, "ResourceNotEmpty", "The bucket you tried to delete is not empty", "ResourceNotEmpty")


def access_denied(message: str = "new row violates row-level security policy") -> StorageError:
    return StorageError(403, "Unauthorized", message, "AccessDenied")


def invalid_token(message: str) -> StorageError:
    return StorageError(400, "InvalidJWT", message, "InvalidJWT")


def invalid_request(message: str, error: str = "Error") -> StorageError:
    return StorageError(400, error, message, "InvalidRequest")


def invalid_bucket() -> StorageError:
    return StorageError(400, "Invalid Input", "Bucket name invalid", "InvalidBucketName")


def invalid_key(key: str) -> StorageError:
    return StorageError(400, "InvalidKey", f"Invalid key: {key}", "InvalidKey")


def invalid_type(content_type: str) -> StorageError:
    return StorageError(415, "invalid_mime_type", f"mime type {content_type} is not supported", "InvalidMimeType")


def too_large() -> StorageError:
    return StorageError(413, "Payload too large", "The object exceeded the maximum allowed size", "EntityTooLarge")


def invalid_range() -> StorageError:
    return StorageError(416, "invalid_range", "invalid range provided", "InvalidRange", http=416)


def internal() -> StorageError:
    return StorageError(500, "Internal", "Internal Server Error", "InternalError", http=500)


def not_implemented(what: str) -> StorageError:
    return StorageError(501, "NotImplemented", f"image-jobs dev does not have {what}.", "NotImplemented", http=501)
