"""Access tokens: /token, for a password or for a refresh token."""

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from daemon.dev.supabase.auth.errors import AuthError, invalid, invalid_credentials, not_implemented, refused_refresh
from daemon.dev.supabase.auth.passwords import fits
from daemon.dev.supabase.auth.requests import json_body, require_key, text_in
from daemon.dev.supabase.auth.sessions import ReusedToken, Sessions
from daemon.dev.supabase.auth.users import Users
from daemon.dev.supabase.errors import ApiError, JsonResponse
from daemon.dev.supabase.keys import Keys

_FAILED = "Database error granting user"
_OTHERS = ("id_token", "pkce", "web3")


class Grants:
    """Handles requests for `/token`."""

    def __init__(self, users: Users, sessions: Sessions, keys: Keys) -> None:
        self._users = users
        self._sessions = sessions
        self._keys = keys
        self.routes = [Route("/token", self.token, methods=["POST"])]

    async def token(self, request: Request) -> Response:
        """Return a session."""
        require_key(request, self._keys)
        match request.query_params.get("grant_type"):
            case "password":
                return await self._password(request)
            case "refresh_token":
                return await self._refresh_token(request)
            case kind if kind in _OTHERS:
                raise not_implemented(f"the grant {kind}")
            case _:
                raise invalid_credentials("unsupported_grant_type")

    async def _password(self, request: Request) -> Response:
        body = await json_body(request)
        email, phone, password = (text_in(body, name) for name in ("email", "phone", "password"))
        if email and phone:
            raise invalid("Only an email address or phone number should be provided on login.")
        if phone:
            raise AuthError(422, "phone_provider_disabled", "Phone logins are disabled")
        if not email:
            raise invalid("missing email or phone")
        user = await self._users.by_email(email.strip().lower())
        if user is None or not await fits(password, user["encrypted_password"]):
            raise invalid_credentials()
        async with self._users.transaction(_FAILED) as connection:
            session, token = await self._sessions.start(connection, user["id"], "password")
            shown = await self._users.as_json(connection, user["id"])
            return JsonResponse(await self._sessions.as_json(connection, session, token, shown))

    async def _refresh_token(self, request: Request) -> Response:
        refresh_token = text_in(await json_body(request), "refresh_token")
        if not refresh_token:
            required = {"error": "invalid_request", "error_description": "refresh_token required"}
            raise ApiError(400, "refresh_token required", required)
        try:
            async with self._users.transaction(_FAILED) as connection:
                session, user, token = await self._sessions.renew(connection, refresh_token)
                shown = await self._users.as_json(connection, user)
                return JsonResponse(await self._sessions.as_json(connection, session, token, shown))
        except ReusedToken as error:
            await self._sessions.revoke(error.session)
            raise refused_refresh("refresh_token_already_used", "Already Used") from None
