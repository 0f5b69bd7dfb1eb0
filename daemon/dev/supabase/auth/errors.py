"""The Auth server's errors: status, code, message; and the two forms of their body."""

from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import Response

from daemon.dev.supabase.errors import ApiError, JsonResponse

VERSION_HEADER = "x-supabase-api-version"
VERSION = "2024-01-01"
"""From this version on, `code` is the error's code; before, it was the status."""


class AuthError(ApiError):
    """An error of the Auth endpoint.

    Args:
        status: Of the response.
        code: Which supabase-js shows as `error.code`.
        message: For people.
        reasons: Of a weak password.
    """

    def __init__(self, status: int, code: str, message: str, reasons: Sequence[str] = ()) -> None:
        weak = {"weak_password": {"reasons": list(reasons)}} if reasons else {}
        super().__init__(status, message, {"code": code, "message": message, **weak}, {"x-sb-error-code": code})
        self._older = {"code": status, "error_code": code, "msg": message, **weak}

    def response(self, request: Request | None = None) -> Response:
        """Make the response, in the form that the request asks for."""
        if request is None or request.headers.get(VERSION_HEADER, "") < VERSION:
            return JsonResponse(self._older, self.status, self.headers)
        return JsonResponse(self.body, self.status, {**(self.headers or {}), VERSION_HEADER: VERSION})


def invalid(message: str) -> AuthError:
    return AuthError(400, "validation_failed", message)


def bad_json(message: str) -> AuthError:
    return AuthError(400, "bad_json", f"Could not parse request body as JSON: {message}")


def invalid_credentials(message: str = "Invalid login credentials") -> AuthError:
    return AuthError(400, "invalid_credentials", message)


def weak_password(message: str, reasons: Sequence[str]) -> AuthError:
    return AuthError(422, "weak_password", message, reasons)


def no_key() -> ApiError:
    """Make the gateway's error: Auth itself is asked only with a key of the project."""
    hint = "No `apikey` request header or url param was found."
    return ApiError(401, "No API key", {"message": "No API key found in request", "hint": hint})


def wrong_key() -> ApiError:
    hint = "Double check your Supabase `anon` or `service_role` API key."
    return ApiError(401, "Invalid API key", {"message": "Invalid API key", "hint": hint})


def no_token() -> AuthError:
    return AuthError(401, "no_authorization", "This endpoint requires a valid Bearer token")


def bad_token(reason: str) -> AuthError:
    return AuthError(403, "bad_jwt", reason)


def no_user() -> AuthError:
    return AuthError(403, "user_not_found", "User from sub claim in JWT does not exist")


def no_session() -> AuthError:
    return AuthError(403, "session_not_found", "Session from session_id claim in JWT does not exist")


def refused_refresh(code: str, why: str) -> AuthError:
    return AuthError(400, code, f"Invalid Refresh Token: {why}")


def failed(message: str) -> AuthError:
    """Make the error for one of the database: a trigger of the application, or a constraint of it."""
    return AuthError(500, "unexpected_failure", message)


def not_implemented(what: str) -> AuthError:
    has = "it signs in anonymously, or by e-mail and password, and sends no mail"
    return AuthError(501, "not_implemented", f"image-jobs dev does not have {what}: {has}.")
