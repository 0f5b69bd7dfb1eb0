"""A local stand-in for Supabase Auth, as far as supabase-js and supabase-py call it to sign in.

Sign-up anonymously and by e-mail and password, sign-in, refresh, the user, its update, sign-out: with the JSON and the
errors of the real server, confirmed at once, since no mail is sent. Everything else is 501. Users, identities and sessions
are in the schema `auth` of the database, where foreign keys and triggers of an application find them.

signups     /signup
grants      /token: password, refresh_token
accounts    /user, /logout
users       the tables of users and identities
sessions    sessions, refresh tokens, access tokens
passwords   rules and hashes
requests    API key, token and body of a request
errors      error responses
"""

from datetime import timedelta

import asyncpg
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route

from daemon.dev.supabase.auth.accounts import Accounts
from daemon.dev.supabase.auth.errors import not_implemented
from daemon.dev.supabase.auth.grants import Grants
from daemon.dev.supabase.auth.sessions import Sessions
from daemon.dev.supabase.auth.signups import Signups
from daemon.dev.supabase.auth.users import Users
from daemon.dev.supabase.errors import error_handlers
from daemon.dev.supabase.keys import Keys

PREFIX = "/auth/v1"
TOKEN_LIFETIME = timedelta(hours=1)
"""Of an access token, as in a new project."""


def auth_app(
    pool: "asyncpg.Pool[asyncpg.Record]", keys: Keys, url: str, *, lifetime: timedelta = TOKEN_LIFETIME
) -> Starlette:
    """Make the application, with all its routes below `/auth/v1`.

    Args:
        pool: Connections as `supabase_auth_admin`, the role of the real server.
        keys: Of the project.
        url: Of the project; tokens name it as their issuer.
        lifetime: Of an access token.
    """
    users, sessions = Users(pool), Sessions(pool, keys, f"{url}{PREFIX}", lifetime)
    parts = (Signups(users, sessions, keys), Grants(users, sessions, keys), Accounts(users, sessions, keys))

    async def key_set(_: Request) -> Response:
        """Return no keys: tokens are signed with a shared secret."""
        return JSONResponse({"keys": []})

    routes = [route for part in parts for route in part.routes]
    return Starlette(
        routes=[Mount(PREFIX, routes=[*routes, Route("/.well-known/jwks.json", key_set, methods=["GET"])])],
        exception_handlers=error_handlers(not_implemented),
    )
