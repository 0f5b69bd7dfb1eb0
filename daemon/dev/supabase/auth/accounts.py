"""The signed-in user: /user and /logout."""

from typing import NamedTuple
from uuid import UUID

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from daemon.dev.supabase.auth.errors import AuthError, bad_token, invalid, no_session, no_user, not_implemented
from daemon.dev.supabase.auth.passwords import check_strength, fits, hashed
from daemon.dev.supabase.auth.requests import claims_of, json_body, object_in, require_key, text_in
from daemon.dev.supabase.auth.sessions import Sessions
from daemon.dev.supabase.auth.users import User, Users, checked_email
from daemon.dev.supabase.errors import JsonResponse
from daemon.dev.supabase.keys import Keys

_SCOPES = ("global", "local", "others")


class Caller(NamedTuple):
    """The user of an access token, and its session. A token that was signed elsewhere has none."""

    user: User
    session: UUID | None


class Accounts:
    """Handles requests for `/user` and `/logout`."""

    def __init__(self, users: Users, sessions: Sessions, keys: Keys) -> None:
        self._users = users
        self._sessions = sessions
        self._keys = keys
        self.routes = [
            Route("/user", self.show, methods=["GET"]),
            Route("/user", self.update, methods=["PUT"]),
            Route("/logout", self.sign_out, methods=["POST"]),
        ]

    async def show(self, request: Request) -> Response:
        """Return the user."""
        user, _ = await self._caller(request)
        return JsonResponse(await self._users.as_json(None, user["id"]))

    async def update(self, request: Request) -> Response:
        """Change data, password or address. A new password ends the user's other sessions."""
        user, session = await self._caller(request)
        body = await json_body(request)
        email, password = (text_in(body, name) for name in ("email", "password"))
        if text_in(body, "phone"):
            raise not_implemented("telephone numbers")
        if body.get("app_metadata") is not None:
            raise AuthError(403, "not_admin", "Updating app_metadata requires admin privileges")
        email = checked_email(email) if email else ""
        changed = email if email != (user["email"] or "") else ""
        if changed and not user["is_anonymous"]:
            raise not_implemented("a change of the e-mail address, which a mail has to confirm")
        if password:
            check_strength(password)
            if user["is_anonymous"] and not changed:
                without = "Updating password of an anonymous user without an email or phone is not allowed"
                raise AuthError(422, "validation_failed", without)
            if await fits(password, user["encrypted_password"]):
                same = "New password should be different from the old password."
                raise AuthError(422, "same_password", same)
        password_hash = await hashed(password) if password else None
        async with self._users.transaction("Error updating user") as connection:
            await self._users.update(connection, user, changed or None, password_hash, object_in(body, "data") or {})
            shown = await self._users.as_json(connection, user["id"])
        if password:
            await self._sessions.end(user["id"], but=session)
        return JsonResponse(shown)

    async def sign_out(self, request: Request) -> Response:
        """End this session, all of the user's, or all others. Access tokens stay valid until they expire."""
        user, session = await self._caller(request)
        scope = request.query_params.get("scope") or "global"
        if scope not in _SCOPES:
            raise invalid(f'Unsupported logout scope "{scope}"')
        await self._sessions.end(
            user["id"],
            only=session if scope == "local" else None,
            but=session if scope == "others" else None,
        )
        return Response(status_code=204)

    async def _caller(self, request: Request) -> Caller:
        """Return the caller.

        Raises:
            AuthError: If the token is not valid, or its user or session is no more.
        """
        require_key(request, self._keys)
        claims = claims_of(request, self._keys)
        try:
            subject = UUID(str(claims["sub"]))
            session = UUID(str(claims["session_id"])) if claims.get("session_id") else None
        except ValueError:
            raise bad_token("invalid claim: sub claim must be a UUID") from None
        user = await self._users.by_id(subject)
        if user is None:
            raise no_user()
        if session is not None and not await self._sessions.is_open(session):
            raise no_session()
        return Caller(user, session)
