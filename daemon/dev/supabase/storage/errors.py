"""The Storage server's errors: HTTP 400 for nearly all of them, the real status in the body."""

from daemon.dev.supabase.errors import ApiError


class StorageError(ApiError):
    """An error of the Storage endpoint.

    Args:
        status: `statusCode` of the body.
        error: The older code, which storage3 reads as `code`.
        message: For people.
        code: The newer code.
        http: The HTTP status.
    """

    def __init__(self, status: int, error: str, message: str, code: str, *, http: int = 400) -> None:
        super().__init__(http, message, {"statusCode": str(status), "error": error, "message": message, "code": code})


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


def no_transformations(method: str, path: str) -> ApiError:
    """Make the response of a server whose image transformations are off: it has no such route."""
    message = f"Route {method}:{path} not found"
    return ApiError(404, message, {"statusCode": "404", "error": "Not Found", "message": message})


def internal() -> StorageError:
    return StorageError(500, "Internal", "Internal Server Error", "InternalError", http=500)


def not_implemented(what: str) -> StorageError:
    return StorageError(501, "NotImplemented", f"image-jobs dev does not have {what}.", "NotImplemented", http=501)
