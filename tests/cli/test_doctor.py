"""doctor: a cure for each problem."""

from tests.support.commands import PASSWORD, UNREACHABLE


async def test_doctor_names_a_cure_for_each_problem(image_jobs, postgres):
    async with postgres.database(template=None) as dsn:
        done = await image_jobs("doctor", "--json", DATABASE_URL=dsn)
    assert done.code == 1
    found = {finding["name"]: finding for finding in done.json}
    assert {name for name, finding in found.items() if finding["state"] == "problem"} == {
        "migrations",
        "storage",
        "providers",
    }
    assert found["database"]["state"] == found["listen"]["state"] == "ok"
    assert all(finding["cure"] for finding in found.values() if finding["state"] == "problem")


async def test_doctor_goes_on_without_a_database(image_jobs):
    done = await image_jobs("doctor", DATABASE_URL=f"postgresql://u:{PASSWORD}@127.0.0.1:1/db", **UNREACHABLE)
    assert done.code == 1
    assert [line.split()[1] for line in done.out.splitlines() if line.startswith("problem")] == [
        "database",
        "storage",
        "providers",
    ]
    assert PASSWORD not in done.out + done.err
    assert "a-key-that-is-secret" not in done.out + done.err
