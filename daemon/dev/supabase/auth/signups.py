"""Sign-up: /signup, anonymously or by e-mail and password."""

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from daemon.dev.supabase.auth.errors import AuthError, invalid
from daemon.dev.supabase.auth.passwords import check_strength, hashed
from daemon.dev.supabase.auth.requests import json_body, object_in, require_key, text_in
from daemon.dev.supabase.auth.sessions import Sessions
from daemon.dev.supabase.auth.users import Users, checked_email
from daemon.dev.supabase.errors import JsonResponse
from daemon.dev.supabase.keys import Keys


class Signups:
    """Handles requests for `/signup`."""

    def __init__(self, users: Users, sessions: Sessions, keys: Keys) -> None:
        self._users = users
        self._sessions = sessions
        self._keys = keys
        self.routes = [Route("/signup", self.sign_up, methods=["POST"])]

    async def sign_up(self, request: Request) -> Response:
        """Create a user, confirmed at once, and sign it in. Without an address it is anonymous."""
        require_key(request, self._keys)
        body = await json_body(request)
        email, phone, password = (text_in(body, name) for name in ("email", "phone", "password"))
        data = object_in(body, "data") or {}
        if not email and not phone:
            return await self._create(None, None, data, "Database error creating anonymous user")
        if not password:
            raise invalid("Signup requires a valid password")
        check_strength(password)
        if email and phone:
            raise invalid("Only an email address or phone number should be provided on signup.")
        if phone:
            raise AuthError(400, "phone_provider_disabled", "Phone signups are disabled")
        email = checked_email(email)
        return await self._create(email, await hashed(password), data, "Database error saving new user")

    async def _create(
        self, email: str | None, password_hash: str | None, data: dict[str, object], error: str
    ) -> Response:
        async with self._users.transaction(error) as connection:
            user = await self._users.create(connection, email, password_hash, data)
            session, token = await self._sessions.start(connection, user, "password" if email else "anonymous")
            shown = await self._users.as_json(connection, user)
            return JsonResponse(await self._sessions.as_json(connection, session, token, shown))
