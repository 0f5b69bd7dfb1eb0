"""The Auth stand-in: keys, errors, sessions and their refresh tokens, as of the real server's source."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import httpx
import pytest
import websockets

from tests.support.postgres import Cluster
from tests.support.realtime_project import Project, running

VERSION = {"x-supabase-api-version": "2024-01-01"}
PASSWORD = "correct horse"


@pytest.fixture(scope="module")
async def project(postgres: Cluster) -> AsyncIterator[Project]:
    async with running(postgres) as one:
        yield one


class Auth:
    """Sends requests to Auth, with the project's key unless another one is given."""

    def __init__(self, project: Project, http: httpx.AsyncClient) -> None:
        self._http = http
        self._project = project

    async def send(self, method: str, path: str, body: Any = None, token: str = "", **headers: str) -> httpx.Response:
        sent = {"apikey": self._project.keys.anon_key, **VERSION}
        if token:
            sent["authorization"] = f"Bearer {token}"
        return await self._http.request(method, f"{self._project.url}/auth/v1{path}", json=body, headers=sent | headers)

    async def error(self, method: str, path: str, body: Any = None, token: str = "") -> tuple[int, str, str]:
        response = await self.send(method, path, body, token)
        return response.status_code, response.json()["code"], response.json()["message"]

    async def signed_up(self) -> dict[str, Any]:
        email = f"{uuid4()}@example.com"
        response = await self.send("POST", "/signup", {"email": email, "password": PASSWORD})
        assert response.status_code == 200, response.text
        return response.json()

    async def signed_in(self, session: dict[str, Any]) -> dict[str, Any]:
        body = {"email": session["user"]["email"], "password": PASSWORD}
        return (await self.send("POST", "/token?grant_type=password", body)).json()

    async def refreshed(self, token: str) -> httpx.Response:
        return await self.send("POST", "/token?grant_type=refresh_token", {"refresh_token": token})

    async def sees_user(self, session: dict[str, Any]) -> tuple[int, str]:
        response = await self.send("GET", "/user", token=session["access_token"])
        return response.status_code, response.json().get("code", "")


@pytest.fixture
async def auth(project: Project) -> AsyncIterator[Auth]:
    async with httpx.AsyncClient(timeout=20) as http:
        yield Auth(project, http)


async def test_a_session_has_the_fields_of_the_real_one(auth: Auth, project: Project):
    session = await auth.signed_up()
    assert set(session) == {"access_token", "token_type", "expires_in", "expires_at", "refresh_token", "user"}
    assert (session["expires_in"], session["expires_at"] - int(time.time()) > 3590) == (3600, True)
    claims = project.keys.claims(session["access_token"])
    assert set(claims) == {
        *("iss", "sub", "aud", "exp", "iat", "email", "phone", "app_metadata", "user_metadata"),
        *("role", "aal", "amr", "session_id", "is_anonymous"),
    }
    assert (claims["iss"], claims["aud"]) == (f"{project.url}/auth/v1", "authenticated")
    assert (claims["amr"][0]["method"], claims["is_anonymous"]) == ("password", False)
    stored = await project.db.fetchval("select encrypted_password from auth.users where email = $1", claims["email"])
    assert PASSWORD not in stored


async def test_a_page_without_the_projects_key_cannot_sign_up(auth: Auth):
    for key, message in (("", "No API key found in request"), ("another.project.key", "Invalid API key")):
        response = await auth.send("POST", "/signup", {}, apikey=key)
        assert (response.status_code, response.json()["message"]) == (401, message)


async def test_errors_have_the_older_form_without_a_version(auth: Auth):
    body = {"email": "nobody@example.com", "password": "secret1"}
    newer = await auth.send("POST", "/token?grant_type=password", body)
    assert newer.json() == {"code": "invalid_credentials", "message": "Invalid login credentials"}
    assert newer.headers["x-supabase-api-version"] == "2024-01-01"
    older = await auth.send("POST", "/token?grant_type=password", body, **{"x-supabase-api-version": ""})
    assert older.status_code == 400
    assert older.json() == {"code": 400, "error_code": "invalid_credentials", "msg": "Invalid login credentials"}


async def test_a_page_of_another_origin_reads_the_errors_code(auth: Auth):
    response = await auth.send("GET", "/user", origin="http://localhost:5173")
    assert response.status_code == 401
    assert response.headers["access-control-allow-origin"] == "*"
    assert "x-supabase-api-version" in response.headers["access-control-expose-headers"]


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        ("/signup", {"email": "a@b.example"}, (400, "validation_failed", "Signup requires a valid password")),
        (
            "/signup",
            {"email": "a@b.example", "password": "x" * 73},
            (400, "validation_failed", "Password cannot be longer than 72 characters"),
        ),
        (
            "/signup",
            {"phone": "123456", "password": PASSWORD},
            (400, "phone_provider_disabled", "Phone signups are disabled"),
        ),
        ("/token?grant_type=password", {}, (400, "validation_failed", "missing email or phone")),
        ("/token?grant_type=magic", {}, (400, "invalid_credentials", "unsupported_grant_type")),
        (
            "/token?grant_type=refresh_token",
            {"refresh_token": "unknown"},
            (400, "refresh_token_not_found", "Invalid Refresh Token: Refresh Token Not Found"),
        ),
    ],
)
async def test_refused_requests_get_the_real_errors(auth: Auth, path: str, body: Any, expected: tuple[int, str, str]):
    assert await auth.error("POST", path, body) == expected


async def test_bodies_that_are_no_objects_are_refused(auth: Auth):
    for body in ([], "text", {"email": 1, "password": "secret1"}, {"data": {"name": "\0"}}):
        assert (await auth.error("POST", "/signup", body))[:2] == (400, "bad_json")


async def test_an_expired_token_is_refused_by_every_endpoint(auth: Auth, project: Project):
    session = await auth.signed_up()
    token = project.keys.sign({**project.keys.claims(session["access_token"]), "exp": int(time.time()) - 1})
    reason = "invalid JWT: unable to parse or verify signature, token has invalid claims: token is expired"
    assert await auth.error("GET", "/user", token=token) == (403, "bad_jwt", reason)
    headers = {"apikey": project.keys.anon_key, "authorization": f"Bearer {token}"}
    async with httpx.AsyncClient(timeout=20, headers=headers) as http:
        rest = await http.get(f"{project.url}/rest/v1/runs?select=id")
    assert (rest.status_code, rest.json()["code"], rest.json()["message"]) == (401, "PGRST303", "JWT expired")
    async with project.wire("2.0.0") as wire:
        (refused,) = await wire.join("realtime:any", "1", token=token)
        assert refused[4]["response"]["reason"].startswith("InvalidJWTToken: Token has expired ")
    with pytest.raises(websockets.InvalidStatus) as handshake:
        await websockets.connect(project.websocket(apikey=token, vsn="2.0.0"))
    assert handshake.value.response.status_code == 401


async def test_tokens_that_name_no_user_are_refused(auth: Auth, project: Project):
    assert (await auth.error("GET", "/user"))[:2] == (401, "no_authorization")
    assert (await auth.error("GET", "/user", token=project.keys.service_role_key))[:2] == (403, "bad_jwt")
    assert (await auth.error("GET", "/user", token="garbage"))[:2] == (403, "bad_jwt")
    assert (await auth.error("GET", "/user", token=project.token(str(uuid4()))))[:2] == (403, "user_not_found")


async def test_a_refresh_token_is_good_for_one_use(auth: Auth, project: Project):
    first = (await auth.signed_up())["refresh_token"]
    second = (await auth.refreshed(first)).json()["refresh_token"]
    assert (await auth.refreshed(first)).json()["refresh_token"] == second, "the response was lost: the same again"
    third = (await auth.refreshed(second)).json()["refresh_token"]
    await project.db.execute(
        "update auth.refresh_tokens set updated_at = now() - interval '11 s' where token = $1", first
    )
    reused = await auth.refreshed(first)
    assert (reused.status_code, reused.json()["code"]) == (400, "refresh_token_already_used")
    assert (await auth.refreshed(third)).json()["code"] == "refresh_token_already_used", "the session ended with it"


async def test_two_tabs_that_refresh_at_once_both_succeed(auth: Auth):
    first = (await auth.signed_up())["refresh_token"]
    responses = await asyncio.gather(*(auth.refreshed(first) for _ in range(4)))
    assert [each.status_code for each in responses] == [200] * 4
    assert len({each.json()["refresh_token"] for each in responses}) == 1


@pytest.mark.parametrize(
    ("scope", "this_one", "other"),
    [("local", False, True), ("others", True, False), ("global", False, False), ("", False, False)],
)
async def test_sign_out_ends_the_sessions_of_its_scope(auth: Auth, scope: str, this_one: bool, other: bool):
    session = await auth.signed_up()
    another = await auth.signed_in(session)
    response = await auth.send("POST", f"/logout?scope={scope}", token=session["access_token"])
    assert (response.status_code, response.content) == (204, b"")
    for each, is_open in ((session, this_one), (another, other)):
        assert await auth.sees_user(each) == ((200, "") if is_open else (403, "session_not_found"))
        refreshed = await auth.refreshed(each["refresh_token"])
        assert (refreshed.status_code == 200) is is_open


async def test_a_new_password_ends_the_other_sessions(auth: Auth):
    session = await auth.signed_up()
    another = await auth.signed_in(session)
    await auth.send("PUT", "/user", {"password": "battery staple"}, session["access_token"])
    assert (await auth.sees_user(session), await auth.sees_user(another)) == ((200, ""), (403, "session_not_found"))


async def test_an_address_of_another_user_cannot_be_taken(auth: Auth):
    session = await auth.signed_up()
    anonymous = (await auth.send("POST", "/signup", {})).json()
    body = {"email": session["user"]["email"].upper()}
    taken = (422, "email_exists", "A user with this email address has already been registered")
    assert await auth.error("PUT", "/user", body, anonymous["access_token"]) == taken
    assert (await auth.error("PUT", "/user", {"email": "new@b.example"}, session["access_token"]))[0] == 501
    assert (await auth.error("PUT", "/user", {"app_metadata": {}}, session["access_token"]))[:2] == (403, "not_admin")


async def test_a_failing_trigger_of_the_application_fails_sign_up(auth: Auth, project: Project):
    await project.db.execute("""
        create table public.profiles (id uuid primary key references auth.users (id) on delete cascade, name text not null);
        create function public.add_profile() returns trigger language plpgsql security definer set search_path = '' as $$
        begin
          insert into public.profiles values (new.id, new.raw_user_meta_data ->> 'name');
          return new;
        end $$;
        create trigger add_profile after insert on auth.users for each row execute function public.add_profile();
    """)
    try:
        assert await auth.error("POST", "/signup", {"email": "owl@example.com", "password": PASSWORD}) == (
            *(500, "unexpected_failure"),
            "Database error saving new user",
        )
        body = {"email": "owl@example.com", "password": PASSWORD, "data": {"name": "owl"}}
        session = (await auth.send("POST", "/signup", body)).json()
        assert await project.db.fetchval("select id::text from profiles where name = 'owl'") == session["user"]["id"]
    finally:
        await project.db.execute("drop function public.add_profile() cascade; drop table public.profiles")
