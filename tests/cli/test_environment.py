"""Commands in environments that operators have: encodings, proxies, addresses of other drivers, misspelt names."""

import json

import pytest

from tests.support.commands import PASSWORD, fail_run, insert_run

SAID = "Kein Rot übrig → „Ocker“ 🎨"
REST = {"SUPABASE_URL": "http://127.0.0.1:1", "SUPABASE_SERVICE_ROLE_KEY": "key"}


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
async def test_terminals_of_every_encoding_are_printed_on(image_jobs, database, db, encoding):
    run_id = await insert_run(db, "job_a")
    await fail_run(db, run_id, SAID)
    for arguments in (("status",), ("events", run_id), ("doctor",), ("requeue", run_id)):
        process = await image_jobs.start(*arguments, DATABASE_URL=database, PYTHONIOENCODING=encoding)
        out, err = await process.communicate()
        assert process.returncode == (1 if arguments == ("doctor",) else 0), err
        assert b"UnicodeEncodeError" not in err
        assert out.decode("utf-8" if encoding == "ascii" else encoding)  # click takes ASCII for a UTF-8 set up wrongly
    process = await image_jobs.start("events", run_id, "--json", DATABASE_URL=database, PYTHONIOENCODING=encoding)
    out, _ = await process.communicate()
    assert SAID in [event["payload"].get("message") for event in json.loads(out.decode(encoding))]


async def test_addresses_of_other_drivers_reach_the_database(image_jobs, database):
    address = database.replace("postgresql://", "postgresql+asyncpg://")
    done = await image_jobs("status", "--json", DATABASE_URL=f'"{address}?pgbouncer=true&connection_limit=1"')
    assert done.code == 0
    assert done.err.splitlines() == [
        "pgbouncer in DATABASE_URL is ignored: only other drivers know it.",
        "connection_limit in DATABASE_URL is ignored: only other drivers know it.",
    ]


async def test_env_file_in_utf16_is_read(image_jobs, database):
    (image_jobs.directory / ".env").write_text(f"DATABASE_URL={database}\n", encoding="utf-16")
    assert (await image_jobs("status", "--json")).code == 0


async def test_misspelt_setting_is_pointed_out(image_jobs, database):
    done = await image_jobs("status", "--json", DATABASE_URL=database, IMAGE_JOBS_CONCURENCY="5")
    assert done.code == 0
    assert done.err == "IMAGE_JOBS_CONCURENCY is ignored; did you mean IMAGE_JOBS_CONCURRENCY?\n"


async def test_the_daemon_logs_what_it_ignores(image_jobs):
    address = f"postgresql://me:{PASSWORD}@127.0.0.1:1/db?pgbouncer=true"
    process = await image_jobs.start("run", DATABASE_URL=address, IMAGE_JOBS_CONCURENCY="5", **REST)
    assert process.stderr is not None
    lines = [json.loads(await process.stderr.readline()) for _ in range(2)]
    process.kill()
    await process.wait()
    assert [line["event"] for line in lines] == ["environment.ignored"] * 2
    assert [line["remark"].split()[0] for line in lines] == ["IMAGE_JOBS_CONCURENCY", "pgbouncer"]


CONTAINER_HOST = {
    "HTTPS_PROXY": "http://10.0.0.1:3128",
    "NO_PROXY": "localhost,,::1/128,fd00::/8,10.0.0.0/8,[::1]:80,*.internal",
    **dict.fromkeys(("OPENAI_API_KEY", "GOOGLE_API_KEY", "STABILITY_API_KEY"), "key"),
    **REST,
}
"""Variables as container hosts inject them."""


async def test_variables_of_container_hosts_do_not_stop_doctor(image_jobs, database):
    done = await image_jobs("doctor", "--json", DATABASE_URL=database, **CONTAINER_HOST)
    assert done.err == ""


async def test_variables_of_container_hosts_stop_no_daemon(image_jobs, database):
    """Its HTTP clients are made before it has started: of every provider, and of Storage."""
    process = await image_jobs.start("run", DATABASE_URL=database, **CONTAINER_HOST)
    assert process.stderr is not None
    logged = []
    while not logged or logged[-1]["event"] != "daemon.started":
        line = await process.stderr.readline()
        assert line, (await process.wait(), logged)
        logged.append(json.loads(line))
    process.terminate()
    assert {"google", "openai", "stability"} <= set(logged[-1]["providers"])
    assert "provider.broken" not in [line["event"] for line in logged]
    await process.communicate()
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("ALL_PROXY", "socks5://10.0.0.1"), ("SSL_CERT_FILE", "/nowhere"), ("OPENAI_API_KEY", f"sk-\n{PASSWORD}")),
        *(("HTTPS_PROXY", f"http://me:{PASSWORD}@[10.0.0.1"), ("OPENAI_BASE_URL", "https://[")),
    ],
)
async def test_unusable_variable_is_one_sentence(image_jobs, database, name, value):
    environment = {"OPENAI_API_KEY": "key", "DATABASE_URL": database, **REST, name: value}
    done = await image_jobs("run", **environment)
    assert done.code == 2
    assert name in done.err
    assert PASSWORD not in done.err
    assert len(done.err.splitlines()) <= 2
