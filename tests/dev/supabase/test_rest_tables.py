"""The REST stand-in: filters, columns, pages, and writes of rows."""

from collections.abc import AsyncIterator

import pytest
from postgrest import APIError

from tests.support.postgres import Cluster
from tests.support.rest_project import Project, running


@pytest.fixture
async def project(postgres: Cluster) -> AsyncIterator[Project]:
    """A project for one test."""
    async with running(postgres) as one:
        yield one


@pytest.fixture(scope="module")
async def unchanged(postgres: Cluster) -> AsyncIterator[Project]:
    """A project for all tests that only read."""
    async with running(postgres) as one:
        yield one


async def ids(project: Project, query: str) -> list[int]:
    response = await project.send("GET", f"/things?select=id&order=id&{query}")
    assert response.status_code == 200, response.text
    return [row["id"] for row in response.json()]


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("id=eq.2", [2]),
        ("id=neq.2", [1, 3]),
        ("size=gt.4", [2]),
        ("size=gte.4", [2, 3]),
        ("size=lt.4", [1]),
        ("size=lte.4", [1, 3]),
        ("name=like.*ea*", [2]),
        ("name=ilike.BEA*", [2]),
        ("name=match.^a", [1, 3]),
        ("name=imatch.^A", [1, 3]),
        ("code=is.null", [3]),
        ("code=is.not_null", [1, 2]),
        ("code=not.is.null", [1, 2]),
        ("code=isdistinct.ant", [2, 3]),
        ("code=eq.bearish", []),
        ("id=in.(1,3)", [1, 3]),
        ("id=in.()", []),
        ('name=in.("a, \\"cat\\"",ant)', [1, 3]),
        ("id=not.in.(1,3)", [2]),
        ("tags=cs.{big}", [2]),
        ("tags=cd.{small,big}", [1, 3]),
        ("tags=ov.{brown,small}", [1, 2]),
        ('data=cs.{"legs":4}', [2, 3]),
        ("data->>legs=eq.6", [1]),
        ("data->legs=gt.4", [1]),
        ("data->at->home->>1=eq.wood", [1]),
        ("or=(id.eq.1,name.eq.bear)", [1, 2]),
        ('or=(name.eq."a, \\"cat\\"",id.eq.1)', [1, 3]),
        ("or=(and(id.gt.1,size.lt.10),id.in.(1))", [1, 3]),
        ("and=(id.gte.1,not.or(id.eq.1,id.eq.2))", [3]),
        ("not.and=(id.gte.1,id.lte.2)", [3]),
        ("or=(tags.cs.{big,brown},id.not.gt.1)", [1, 2]),
        ("id=gt.1&id=lt.3", [2]),
        ('"odd \\"name"=eq.b', [2]),
    ],
)
async def test_filters_match_as_in_postgrest(unchanged: Project, query: str, expected: list[int]) -> None:
    assert await ids(unchanged, query) == expected


async def test_columns_can_be_renamed_cast_and_read_from_json(unchanged: Project) -> None:
    client = await unchanged.client()
    found = (
        await client.table("things")
        .select('id, wide:size::text, data->>legs, home:data->at->home->0, "odd \\"name"')
        .eq("id", 1)
        .execute()
    )
    assert found.data == [{"id": 1, "wide": "1.50", "legs": "6", "home": "hill", 'odd "name': "a"}]


async def test_a_count_comes_with_the_page(unchanged: Project) -> None:
    client = await unchanged.client()
    found = await client.table("things").select("id", count="exact").order("id", desc=True).range(1, 1).execute()
    assert (found.data, found.count) == ([{"id": 2}], 3)
    response = await unchanged.send("GET", "/things?select=id", Prefer="count=exact", Range="0-1")
    assert (response.status_code, response.headers["content-range"]) == (206, "0-1/3")
    head = await unchanged.send("HEAD", "/things", Prefer="count=exact")
    assert (head.status_code, head.headers["content-range"], head.content) == (200, "0-2/3", b"")
    assert await unchanged.error("GET", "/things?offset=9", Prefer="count=exact") == (416, "PGRST103")
    assert (await unchanged.send("GET", "/things?id=eq.9")).headers["content-range"] == "*/*"


async def test_rows_can_be_sorted_by_json_with_nulls_first_or_last(unchanged: Project) -> None:
    response = await unchanged.send("GET", "/things?select=id&order=data->legs.desc,code.asc.nullsfirst&limit=3")
    assert [row["id"] for row in response.json()] == [1, 3, 2]


async def test_a_single_row_is_an_object_other_numbers_are_errors(unchanged: Project) -> None:
    client = await unchanged.client()
    assert (await client.table("things").select("name").eq("id", 1).single().execute()).data == {"name": "ant"}
    assert await client.table("things").select("name").eq("id", 9).maybe_single().execute() is None
    with pytest.raises(APIError) as caught:
        await client.table("things").select("name").single().execute()
    assert caught.value.code == "PGRST116"
    assert caught.value.details == "The result contains 3 rows"
    response = await unchanged.send("GET", "/things", Accept="application/vnd.pgrst.object+json")
    assert response.status_code == 406


async def test_nulls_can_be_left_out(unchanged: Project) -> None:
    response = await unchanged.send(
        "GET", "/things?id=eq.3&select=id,code", Accept="application/vnd.pgrst.array+json;nulls=stripped"
    )
    assert response.json() == [{"id": 3}]


async def test_inserts_return_rows_only_on_request(project: Project) -> None:
    client = await project.client()
    made = await client.table("things").insert({"id": 4, "name": "dog", "data": {"a": [1, None]}}).execute()
    assert (made.data[0]["name"], made.data[0]["data"]) == ("dog", {"a": [1, None]})
    made = await client.table("things").insert([{"id": 5}, {"id": 6, "name": "elk"}], count="exact").execute()
    assert ([row["name"] for row in made.data], made.count) == ([None, "elk"], 2)
    response = await project.send("POST", "/things", {"id": 7}, Prefer="return=minimal")
    assert (response.status_code, response.content, response.headers["preference-applied"]) == (
        201,
        b"",
        "return=minimal",
    )
    response = await project.send("POST", "/notes?select=text", {}, Prefer="return=representation")
    assert (response.status_code, response.json()) == (201, [{"text": "empty"}])
    response = await project.send("POST", "/things", [], Prefer="return=representation")
    assert (response.status_code, response.json()) == (201, [])


async def test_upserts_update_or_keep_existing_rows(project: Project) -> None:
    client = await project.client()
    await client.table("things").upsert([{"id": 1, "name": "bee"}, {"id": 8, "name": "fox"}]).execute()
    await client.table("things").upsert({"id": 9, "name": "fox"}, on_conflict="name", ignore_duplicates=True).execute()
    found = await client.table("things").select("id,name,size").in_("id", [1, 8, 9]).order("id").execute()
    assert found.data == [{"id": 1, "name": "bee", "size": 1.5}, {"id": 8, "name": "fox", "size": None}]
    response = await project.send("POST", "/things", {"id": 1}, Prefer="resolution=merge-duplicates")
    assert response.status_code == 200


async def test_updates_and_deletes_apply_to_filtered_rows_alone(project: Project) -> None:
    client = await project.client()
    changed = await client.table("things").update({"code": "x", "tags": ["new"]}).gt("id", 1).execute()
    assert [(row["id"], row["tags"]) for row in changed.data] == [(2, ["new"]), (3, ["new"])]
    assert (await project.send("PATCH", "/things?id=eq.1", {"code": "y"})).status_code == 204
    assert (await client.table("things").update({}).eq("id", 1).execute()).data == []
    deleted = await client.table("things").delete(count="exact").eq("code", "x").execute()
    assert deleted.count == 2
    assert await ids(project, "") == [1]


async def test_a_single_row_update_of_several_is_rolled_back(project: Project) -> None:
    single = "application/vnd.pgrst.object+json"
    headers = {"Accept": single, "Prefer": "return=representation"}
    assert await project.error("PATCH", "/things?id=gt.1", {"code": "x"}, **headers) == (406, "PGRST116")
    assert await ids(project, "code=eq.x") == []


async def test_a_new_column_is_returned_at_once(project: Project) -> None:
    client = await project.client()
    for column in (None, "fresh"):
        if column:
            await project.db.execute("alter table things add column fresh integer default 7")
        found = await client.table("things").select("*").eq("id", 1).single().execute()
        assert found.data.get("fresh") == (7 if column else None)


async def test_updates_and_deletes_need_a_filter(unchanged: Project) -> None:
    assert await unchanged.error("PATCH", "/things", {"code": "x"}) == (400, "21000")
    assert await unchanged.error("DELETE", "/things") == (400, "21000")
