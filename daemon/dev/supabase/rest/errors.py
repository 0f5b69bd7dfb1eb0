"""PostgREST's errors: their codes, messages and hints, and the HTTP status of each SQLSTATE."""

import json
from collections.abc import Mapping
from typing import Any

import asyncpg

from daemon.dev.supabase.errors import ApiError

_BY_CODE = {
    "23503": 409,
    "23505": 409,
    "25006": 405,
    "42883": 404,
    "42P01": 404,
    "42P17": 500,
    "P0001": 400,
    "57P01": 503,
}
_BY_CLASS = {
    "08": 503,
    "0L": 403,
    "0P": 403,
    "28": 403,
    "53": 503,
    **dict.fromkeys(("09", "25", "2D", "38", "39", "3B", "40", "54", "55", "57", "58", "F0", "HV", "P0", "XX"), 500),
}


class RestError(ApiError):
    """An error of the REST endpoint. `code` is an SQLSTATE or one of PostgREST's own codes."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        details: Any = None,
        hint: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(
            status,
            message,
            {"code": code, "details": details, "hint": hint, "message": message},
            {**({"WWW-Authenticate": "Bearer"} if status == 401 else {}), **(headers or {})},
        )


def from_postgres(error: asyncpg.PostgresError, role: str) -> RestError:
    """Turn an error of the database into a response.

    Args:
        error: `PTxyz` sets status xyz, `PGRST` describes the whole response; other SQLSTATEs are looked up.
        role: Of the caller. A refusal is 401 to `anon`, who may still sign in, and 403 to other roles.
    """
    code = error.sqlstate or "XX000"
    message, detail, hint = (getattr(error, name, None) for name in ("message", "detail", "hint"))
    if code == "PGRST":
        return _described_response(message or "", detail or "")
    if code.startswith("PT") and code[2:].isdecimal():
        status = int(code[2:])
    elif code == "42501":
        status = 401 if role == "anon" else 403
    elif code == "21000":
        status = 400 if str(message).endswith("requires a WHERE clause") else 500
    else:
        status = _BY_CODE.get(code) or _BY_CLASS.get(code[:2], 400)
    return RestError(status, code, message or "", details=detail, hint=hint)


def _described_response(message: str, detail: str) -> RestError:
    """Read the response that `raise sqlstate 'PGRST'` describes: message is the body, detail status and headers."""
    try:
        body, rest = json.loads(message), json.loads(detail)
        return RestError(
            rest["status"],
            body["code"],
            body["message"],
            details=body.get("details"),
            hint=body.get("hint"),
            headers=rest["headers"],
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return RestError(
            500,
            "PGRST121",
            "Could not parse JSON in the \"RAISE SQLSTATE 'PGRST'\" error",
            details=f"Invalid JSON value for MESSAGE: '{message}'",
            hint="MESSAGE must be a JSON object with obligatory keys: 'code', 'message'. DETAIL: 'status', 'headers'.",
        )


def not_implemented(what: str) -> RestError:
    return RestError(501, "NotImplemented", f"image-jobs dev does not have {what}.")


def bad_query(what: str, text: str, details: str) -> RestError:
    """Make the error for a query parameter that cannot be parsed."""
    return RestError(400, "PGRST100", f'"failed to parse {what} ({text})" (line 1, column 1)', details=details)


def bad_body(message: str) -> RestError:
    return RestError(400, "PGRST102", message)


def bad_range(details: str) -> RestError:
    return RestError(416, "PGRST103", "Requested range not satisfiable", details=details)


def not_single(rows: int) -> RestError:
    return RestError(
        406, "PGRST116", "Cannot coerce the result to a single JSON object", details=f"The result contains {rows} rows"
    )


def bad_schema(schema: str) -> RestError:
    return RestError(
        406, "PGRST106", f"Invalid schema: {schema}", hint="Only the following schemas are exposed: public"
    )


def no_table(name: str) -> RestError:
    return RestError(404, "PGRST205", f"Could not find the table 'public.{name}' in the schema cache")


def no_column(name: str, table: str) -> RestError:
    return RestError(400, "PGRST204", f"Could not find the '{name}' column of '{table}' in the schema cache")


def no_media_type(accept: str) -> RestError:
    return RestError(406, "PGRST107", f"None of these media types are available: {accept}")
