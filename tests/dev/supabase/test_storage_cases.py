"""The Storage stand-in responds as the real server did: recorded exchanges are replayed with the real client.

`storage_cases.json` has the real server's responses, and the client's results. The cases build on each other,
so they are one test. Ids, times, hashes and tokens differ each time; everything else must not.
"""

import asyncio
import io
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import asyncpg
import httpx
import pytest
from storage3 import AsyncStorageClient
from storage3.exceptions import StorageApiError

from daemon.dev.supabase.keys import Keys, make_keys
from tests.support.postgres import Cluster
from tests.support.storage_project import SECRET, YEAR, Replay, abort, client, png, running

CASES = json.loads(Path(__file__).with_name("storage_cases.json").read_text())["cases"]


@pytest.fixture
def keys() -> Keys:
    return Keys(SECRET, anon_key="sb_publishable_test", service_role_key="sb_secret_test")


@pytest.fixture
async def project(postgres: Cluster) -> AsyncIterator["asyncpg.Pool[asyncpg.Record]"]:
    """Connect to a database without our schema."""
    async with postgres.database(template=None) as dsn, asyncpg.create_pool(dsn, min_size=1, max_size=4) as pool:
        yield pool


@pytest.fixture
async def replay(project: "asyncpg.Pool[asyncpg.Record]", tmp_path: Path, keys: Keys) -> AsyncIterator[Replay]:
    async with running(project, tmp_path / "files", keys) as one:
        yield one


META = {"seed": 7, "run_id": "r1"}


TWO_MB = "runs/r1/n1/2mb.png"


CHANGING = {
    r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}": "<id>",
    r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z": "<time>",
    r"\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT": "<date>",
    r'\\"[0-9a-f]{32}\\"': "<etag>",
    r"token=[\w.-]+": "token=<token>",
}


def steady(value: Any) -> Any:
    """Replace ids, times and the like, which differ in each run."""
    text = json.dumps(value)
    for pattern, name in CHANGING.items():
        text = re.sub(pattern, name, text)
    return json.loads(text)


async def objects_that_were_not_recorded(r: Replay) -> None:
    """Upload objects that later cases read, between the recorded uploads."""
    await r.put("outputs", TWO_MB, png(2_000_000))
    await r.put("outputs", "runs/r1/badct.png", png(20_000), **{"content-type": "png"})
    await r.service.from_("outputs").upload("runs/r1/default.bin", b"hello")
    for name, size in (("fh", 2_000_000), ("none", 20_000), ("path", 2_000_000)):
        await r.put("outputs", f"runs/r1/{name}.png", png(size))
    await r.put("outputs", "runs/r1/meta.png", png(20_000), metadata=META)
    await r.put("private", "a.avif", png(20_000), **{"content-type": "image/avif"})
    await r.raw("POST", "/object/outputs/raw/2.png", png(20_000), content_type="image/png", cache_control="3600")


async def upload_to_key(r: Replay, case: dict[str, Any]) -> Any:
    """Upload to the unusual key of a case."""
    key = case["case"].removeprefix("key name ")
    if "request" in case:
        key = unquote(urlsplit(case["request"]["path"]).path.removeprefix("/storage/v1/object/outputs/"))
    return await r.put("outputs", key, b"\x89P", upsert="true")


async def race(r: Replay, count: int, key: Callable[[int], str]) -> list[str]:
    async def one(n: int) -> str:
        try:
            await r.put("outputs", key(n), png(20_000))
        except StorageApiError as error:
            return f"{error.status} {error.code}"
        return "ok"

    return await asyncio.gather(*map(one, range(count)))


async def sign(r: Replay, key: str, seconds: int, **options: Any) -> Any:
    signed = await r.outputs.create_signed_url(key, seconds, options or None)
    r.signed.url = signed["signedURL"]
    return signed


async def get_signed(r: Replay, token: str | None = None) -> Any:
    return await r.http.get(r.signed.url if token is None else re.sub("token=.*", f"token={token}", r.signed.url))


async def upload_signed(r: Replay) -> Any:
    if not r.signed.upload:
        r.signed.upload = (await r.outputs.create_signed_upload_url("up/1.png"))["token"]
    options = {"content-type": "image/png", "cache-control": YEAR, "x-upsert": "false"}
    return await r.outputs.upload_to_signed_url("up/1.png", r.signed.upload, png(20_000), options)


async def refused_connection() -> Any:
    async with httpx.AsyncClient() as http:
        return await (await client("http://127.0.0.1:9", "key", http)).list_buckets()


Act = Callable[[Replay], Awaitable[Any]]


ACTS: dict[str, Act] = {
    "bucket.create bad name": lambda r: r.service.create_bucket("bad/name"),
    "bucket.create empty name": lambda r: r.service.create_bucket(""),
    'bucket.create file_size_limit as string "20mb"': lambda r: r.service.create_bucket(
        "gone", options={"file_size_limit": "20mb"}
    ),
    "bucket.get": lambda r: r.service.get_bucket("limited"),
    "bucket.get missing": lambda r: r.service.get_bucket("nope"),
    "bucket.list": lambda r: r.service.list_buckets(),
    "bucket.update missing": lambda r: r.service.update_bucket("nope", {"public": True}),
    "bucket.delete missing": lambda r: r.service.delete_bucket("nope"),
    "upload 20KB png": lambda r: r.put("outputs", "runs/r1/n1/0.png", png(20_000)),
    "upload duplicate upsert=false": lambda r: r.put("outputs", "runs/r1/n1/0.png", png(20_000)),
    'upload duplicate upsert="true"': lambda r: r.put("outputs", "runs/r1/n1/0.png", png(20_001), upsert="true"),
    "upload upsert=True (bool)": lambda r: r.put("outputs", "runs/r1/n1/0.png", png(20_000), upsert=True),
    "upload x-upsert header key": lambda r: r.put(
        "outputs", "runs/r1/n1/0.png", png(20_000), upsert="", **{"x-upsert": "true"}
    ),
    "upload 20MB png": lambda r: r.put("outputs", "runs/r1/n1/20mb.png", png(20_000_000)),
    "upload 60MB (global limit 50MB)": lambda r: r.put("outputs", "runs/r1/n1/60mb.png", png(60_000_000)),
    "upload after 60MB still works on same client": lambda r: r.put("outputs", "runs/r1/n1/after.png", png(20_000)),
    "upload 0 bytes": lambda r: r.put("outputs", "runs/r1/empty.png", b""),
    "upload content-type with charset param": lambda r: r.put(
        "outputs", "runs/r1/param.png", png(20_000), **{"content-type": "image/png; foo=bar"}
    ),
    "upload BytesIO": lambda r: r.put("outputs", "x.png", io.BytesIO(b"x")),
    "upload bytearray": lambda r: r.put("outputs", "x.png", bytearray(b"x")),
    "upload memoryview": lambda r: r.put("outputs", "x.png", memoryview(b"x")),
    "limited: allowed 20KB png": lambda r: r.put("limited", "a.png", png(20_000)),
    "limited: 2MB over file_size_limit 1MB": lambda r: r.put("limited", "big.png", png(2_000_000)),
    "limited: wrong mime gif": lambda r: r.put("limited", "a.gif", b"GIF89a", **{"content-type": "image/gif"}),
    "limited: mime with param vs allow list": lambda r: r.put(
        "limited", "p.png", png(20_000), **{"content-type": "image/png; foo=bar"}
    ),
    "limited: default text/plain": lambda r: r.service.from_("limited").upload("a.txt", b"hello"),
    "private: wildcard rejects pdf": lambda r: r.put(
        "private", "a.pdf", b"%PDF", **{"content-type": "application/pdf"}
    ),
    "upload to missing bucket": lambda r: r.put("nope", "a.png", png(20_000)),
    "download from missing bucket": lambda r: r.service.from_("nope").download("a.png"),
    "remove from missing bucket": lambda r: r.service.from_("nope").remove(["a.png"]),
    "exists in missing bucket": lambda r: r.service.from_("nope").exists("a.png"),
    "get_public_url": lambda r: r.outputs.get_public_url(TWO_MB),
    "get_public_url download": lambda r: r.outputs.get_public_url(TWO_MB, {"download": "x.png"}),
    "get_public_url transform": lambda r: r.outputs.get_public_url(
        TWO_MB, {"transform": {"width": 256, "height": 256, "resize": "contain", "quality": 70}}
    ),
    "GET public": lambda r: r.get(f"/object/public/outputs/{TWO_MB}"),
    "GET public Range bad": lambda r: r.get(f"/object/public/outputs/{TWO_MB}", range="bytes=99999999-"),
    "GET public ?download=": lambda r: r.get(f"/object/public/outputs/{TWO_MB}?download="),
    "GET public missing object": lambda r: r.get("/object/public/outputs/runs/none.png"),
    "GET public missing bucket": lambda r: r.get("/object/public/nope/a.png"),
    "GET public of private bucket": lambda r: r.get("/object/public/private/a.avif"),
    "GET public empty object": lambda r: r.get("/object/public/outputs/runs/r1/empty.png"),
    "GET public param ct": lambda r: r.get("/object/public/outputs/runs/r1/param.png"),
    "GET object/info/public": lambda r: r.get(f"/object/info/public/outputs/{TWO_MB}"),
    "GET authenticated route service": lambda r: r.raw("GET", "/object/authenticated/private/a.avif"),
    "download missing object": lambda r: r.outputs.download("runs/none.png"),
    "anon upload (RLS)": lambda r: r.anon.from_("outputs").upload("anon.png", png(20_000)),
    "anon create bucket": lambda r: r.anon.create_bucket("anonb"),
    "anon remove": lambda r: r.anon.from_("outputs").remove(["runs/r1/n1/0.png"]),
    "user upload (RLS no policy)": lambda r: r.user.from_("outputs").upload("u.png", png(20_000)),
    "garbage key: list_buckets": lambda r: _as(r, "garbage", lambda storage: storage.list_buckets()),
    "wrong signature: list_buckets": lambda r: _as(
        r, make_keys("x" * 32).service_role_key, lambda storage: storage.list_buckets()
    ),
    "unknown sb_secret: upload": lambda r: _as(
        r, "sb_secret_unknown", lambda storage: storage.from_("outputs").upload("w.png", png(20_000))
    ),
    "sign url": lambda r: sign(r, TWO_MB, 60),
    "sign url missing object": lambda r: sign(r, "runs/none.png", 60),
    "sign url expiresIn 0": lambda r: sign(r, TWO_MB, 0),
    "sign urls (one missing)": lambda r: r.outputs.create_signed_urls([TWO_MB, "runs/none.png"], 60),
    "sign url with transform (disabled)": lambda r: sign(r, TWO_MB, 60, transform={"width": 256}),
    "GET signed": get_signed,
    "GET signed tampered": lambda r: r.http.get(r.signed.url[:-4] + "aaaa"),
    "GET signed expired": lambda r: get_signed(
        r, r.keys.sign({"url": f"outputs/{TWO_MB}", "scope": "download", "iat": 1, "exp": 2})
    ),
    "upload_to_signed_url": upload_signed,
    "upload_to_signed_url again": upload_signed,
    "info missing": lambda r: r.outputs.info("runs/none.png"),
    "exists true": lambda r: r.outputs.exists("runs/r1/meta.png"),
    "exists false": lambda r: r.outputs.exists("runs/none.png"),
    "HEAD object existing": lambda r: r.raw("HEAD", "/object/outputs/runs/r1/meta.png"),
    "HEAD object missing": lambda r: r.raw("HEAD", "/object/outputs/runs/none.png"),
    "list prefix": lambda r: r.outputs.list("runs/r1"),
    "list_v2": lambda r: r.outputs.list_v2({"prefix": "runs/r1/", "limit": 3, "with_delimiter": True}),
    "copy": lambda r: r.outputs.copy("runs/r1/meta.png", "runs/r1/copy.png"),
    "copy onto existing": lambda r: r.outputs.copy("runs/r1/meta.png", "runs/r1/copy.png"),
    "move": lambda r: r.outputs.move("runs/r1/copy.png", "runs/r1/moved.png"),
    "move missing": lambda r: r.outputs.move("runs/none.png", "runs/x.png"),
    "remove existing+missing": lambda r: r.outputs.remove(["runs/r1/moved.png", "runs/none.png"]),
    "remove missing only": lambda r: r.outputs.remove(["runs/none.png"]),
    "remove []": lambda r: r.outputs.remove([]),
    "DELETE single missing": lambda r: r.raw("DELETE", "/object/outputs/runs/none.png"),
    "GET public raw2": lambda r: r.get("/object/public/outputs/raw/2.png"),
    "raw body chunked (no content-length) 2MB": lambda r: r.raw(
        "POST", "/object/outputs/raw/3.png", _chunks(), content_type="image/png"
    ),
    "json body": lambda r: r.raw("POST", "/object/outputs/raw/6.json", b'{"a":1}', content_type="application/json"),
    "exists after aborted upload": lambda r: r.outputs.exists("abort.png"),
    "bucket.delete non-empty": lambda r: r.service.delete_bucket("outputs"),
    "bucket.empty": lambda r: r.service.empty_bucket("limited"),
    "bucket.delete empty": lambda r: r.service.delete_bucket("limited"),
    "connection refused": lambda _: refused_connection(),
}


async def _as(r: Replay, key: str, act: Callable[[AsyncStorageClient], Awaitable[Any]]) -> Any:
    return await act(await r.with_key(key))


async def _chunks() -> AsyncIterator[bytes]:
    for _ in range(20):
        yield bytes(100_000)


async def _with_etag(r: Replay) -> Any:
    etag = (await r.get(f"/object/public/outputs/{TWO_MB}")).headers["etag"]
    return await r.get(f"/object/public/outputs/{TWO_MB}", **{"if-none-match": etag})


async def _since_before(r: Replay) -> Any:
    """Ask as the recorded client did: the object is newer."""
    return await r.get(f"/object/public/outputs/{TWO_MB}", **{"if-modified-since": "Mon, 23 Nov 2020 14:18:42 GMT"})


ACTS |= {"GET public If-None-Match": _with_etag, "GET public If-Modified-Since": _since_before}


RACES = {
    "8 concurrent non-upsert uploads to one key": lambda r: race(r, 8, lambda _: "race.png"),
    "50 parallel 20KB uploads": lambda r: race(r, 50, lambda n: f"parallel/{n}.png"),
}


async def differences(r: Replay, case: dict[str, Any]) -> list[str]:
    """Replay a case, and return its differences from the recording."""
    name = case["case"]
    act = ACTS.get(name) or (lambda r: upload_to_key(r, case))
    r.exchange = None
    returned, raised = None, None
    try:
        returned = await act(r)
    except StorageApiError as error:
        raised = {"type": "StorageApiError", "code": error.code, "message": error.message, "status": error.status}
    except (AttributeError, TypeError, ValueError) as error:
        raised = {"type": type(error).__name__, "message": str(error)}
    except httpx.ConnectError as error:
        raised = {"type": "httpx.ConnectError", "message": str(error)}
    found = []
    if "request" in case:
        found += _compare_exchange(case, r.exchange)
    if raised != case.get("raises"):
        found.append(f"raises {raised}, not {case.get('raises')}")
    if "returns" in case:
        if isinstance(returned, str):
            returned = returned.removeprefix(r.url)
        if returned != case["returns"]:
            found.append(f"returns {returned!r}, not {case['returns']!r}")
    return [f"{name}: {difference}" for difference in found]


def _compare_exchange(case: dict[str, Any], seen: httpx.Response | None) -> list[str]:
    assert seen is not None, case["case"]
    asked, expected = case["request"], case["response"]
    facts = {
        "method": (seen.request.method, asked["method"]),
        "path": (steady(seen.request.url.raw_path.decode()), steady(asked["path"])),
        "status": (seen.status_code, expected["status"]),
        **{
            f"header {name}": (steady([seen.headers.get(name)]), steady([value]))
            for name, value in expected["headers"].items()
        },
        "body": _bodies(seen, expected["body"]),
    }
    if asked.get("headers", {}).get("content-type") == "application/json":
        facts["length"] = (seen.request.headers.get("content-length"), asked["headers"].get("content-length"))
    return [f"{fact} is {ours!r}, not {theirs!r}" for fact, (ours, theirs) in facts.items() if ours != theirs]


def _bodies(seen: httpx.Response, expected: Any) -> tuple[Any, Any]:
    if isinstance(expected, dict) and "_bytes" in expected:
        return len(seen.content), expected["_bytes"]
    if expected == "":
        return seen.text, ""
    body = seen.json()
    if isinstance(expected, list) and expected and expected[-1] == "...":  # long lists were recorded in part
        expected = expected[:-1]
        body = body[: len(expected)]
    return steady(body), steady(expected)


async def test_every_recorded_case_has_the_recorded_response(replay: Replay) -> None:
    found: list[str] = []
    for case in CASES:
        name = case["case"]
        if name == "get_public_url":
            await objects_that_were_not_recorded(replay)
        if name == "exists after aborted upload":
            await abort(replay)
        if name in RACES:
            outcomes = await RACES[name](replay)
            assert set(outcomes) <= {"ok", "409 Duplicate"}
            assert "ok" in outcomes
        else:
            found += await differences(replay, case)
    assert not found, "\n".join(found)


def test_every_recorded_case_has_an_act() -> None:
    names = {case["case"] for case in CASES}
    assert {name for name in names - ACTS.keys() - RACES.keys() if not name.startswith("key name ")} == set()
    assert (ACTS.keys() | RACES.keys()) <= names
