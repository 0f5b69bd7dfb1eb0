"""Private names and undocumented behaviour of our dependencies, which their next release may change.

Each dependency has an upper bound; those with an entry here at the next minor version: a newer one is let in when these pass
on it. Python has a lower one, which all that checks the source has to take for its target.
"""

import ast
import re
import tomllib
from importlib.metadata import version

import asyncpg
import httpx2
import openai
import pytest
from openai import AsyncOpenAI
from packaging.requirements import Requirement
from packaging.version import Version
from realtime import AsyncRealtimeClient

from daemon.errors import DaemonFenced
from daemon.providers.openai.background import _STREAMED
from tests.support.postgres import ROOT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
REQUIRED = {each.name: each for each in map(Requirement, PROJECT["dependencies"])}
PRIVATE = {"asyncpg", "openai", "realtime"}
"""Bounded at the next minor version."""
BELOW_THE_NEXT_MAJOR = {"google-genai", "httpx2", "pydantic", "pydantic-settings"}
EVERY = [
    *map(Requirement, PROJECT["dependencies"]),
    *(Requirement(each) for extra in PROJECT["optional-dependencies"].values() for each in extra),
    *map(Requirement, PYPROJECT["build-system"]["requires"]),
]
OLDEST = re.fullmatch(r">=(3\.\d+)", PROJECT["requires-python"])


@pytest.mark.parametrize("required", [each for each in EVERY if each.name != PROJECT["name"]], ids=str)
def test_every_dependency_has_an_upper_bound(required):
    assert any(part.operator in ("<", "<=", "==", "~=") for part in required.specifier)


def test_the_oldest_python_is_the_target_of_all_checks():
    """The environment may be newer: what the linters take for the target is what keeps newer words out."""
    assert OLDEST
    oldest = OLDEST[1]
    tools = PYPROJECT["tool"]
    assert tools["ruff"]["target-version"] == f"py{oldest.replace('.', '')}"
    assert tools["basedpyright"]["pythonVersion"] == oldest
    for path in ("README.md", ".github/CONTRIBUTING.md", "tests/run"):
        assert f"Python {oldest} or newer" in (ROOT / path).read_text()
    assert f"sys.version_info < ({oldest.replace('.', ', ')})" in (ROOT / "tests/run").read_text()


def test_the_source_is_of_the_oldest_python():
    assert OLDEST
    version = tuple(map(int, OLDEST[1].split(".")))
    for path in (ROOT / "daemon").rglob("*.py"):
        if "node_modules" not in path.parts:
            ast.parse(path.read_text(), str(path), feature_version=version)


@pytest.mark.parametrize("name", sorted(PRIVATE))
def test_private_names_bound_at_the_next_minor_version(name):
    installed = Version(version(name))
    assert installed in REQUIRED[name].specifier
    assert Version(f"{installed.major}.{installed.minor + 1}.0") not in REQUIRED[name].specifier


@pytest.mark.parametrize("name", sorted(BELOW_THE_NEXT_MAJOR))
def test_sdks_are_bounded_at_the_next_major_version(name):
    installed = Version(version(name))
    assert installed in REQUIRED[name].specifier
    assert Version(f"{installed.major}.{installed.minor + 1}.0") in REQUIRED[name].specifier
    assert Version(f"{installed.major + 1}.0.0") not in REQUIRED[name].specifier


async def test_openai_leaves_the_body_unread_for_our_header():
    read: list[bytes] = []

    async def body():
        for chunk in (b"a", b"b"):
            read.append(chunk)
            yield chunk

    transport = httpx2.MockTransport(lambda _: httpx2.Response(200, content=body()))
    async with AsyncOpenAI(
        api_key="key", base_url="http://example.com", http_client=httpx2.AsyncClient(transport=transport)
    ) as client:
        response = await client.post(
            "/responses", cast_to=httpx2.Response, content=b"{}", options={"headers": {**_STREAMED}}
        )
        assert read == []
        assert await response.aread() == b"ab"


def test_openai_names_our_header_as_we_do():
    assert list(_STREAMED) == [openai._constants.RAW_RESPONSE_HEADER]


def test_realtime_keeps_its_listening_task_where_we_look():
    assert AsyncRealtimeClient("ws://example.com", "key")._listen_task is None


def test_asyncpg_finds_our_error_by_its_sqlstate():
    error = asyncpg.PostgresError.new({"C": DaemonFenced.sqlstate, "M": "fenced"})
    assert isinstance(error, DaemonFenced)
