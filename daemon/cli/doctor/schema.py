"""Check of the tables: what is in the way of image runs, an image run that is tried and undone, and old daemons."""

import re
from importlib.metadata import version

import asyncpg

from daemon.cli.doctor.finding import Finding
from daemon.database import Connection
from daemon.migrate import sql_directory

LOCK_TIMEOUT, STATEMENT_TIMEOUT = "2s", "8s"
"""Others come first: what they lock is looked at another time."""

UNKNOWN = """
with named as (
  select 'provider_limits' as relation, l.provider, l.model from image_jobs.provider_limits l
  union all
  select 'provider_blocks', b.provider, b.model from image_jobs.provider_blocks b where b.until > (select image_jobs.now())
)
select n.relation, concat_ws(':', n.provider, n.model) as name, case when p.name is null then 'provider' else 'model' end as what
from named n left join image_jobs.providers p on p.name = n.provider
where p.name is null or n.model is not null
  and exists (select from image_jobs.models m where m.provider = n.provider)
  and not exists (
    select from image_jobs.models m
    where m.provider = n.provider and m.model in (n.model, regexp_replace(n.model, '-\\d{4}-\\d{2}-\\d{2}$', '')))
order by 1, 2"""
"""Limits and blocks that name nothing on offer; a dated snapshot is listed without its date."""

_BUSY = (asyncpg.LockNotAvailableError, asyncpg.QueryCanceledError, asyncpg.DeadlockDetectedError)


async def check_schema(connection: Connection, *, migrated: bool) -> list[Finding]:
    """Compare the database with what is needed, as a migration does; a migrated one also has an image run tried.

    Nothing remains of either: both run in a transaction that is rolled back.
    """
    said: list[str] = []

    def note(_: object, message: asyncpg.PostgresLogMessage) -> None:
        sentence = getattr(message, "message", None) or ""
        if sentence.startswith("An image run was not tried"):
            said.append(sentence)

    files = sorted((sql_directory() / "schema").glob("0*_compare_*.sql"))
    if migrated:
        files.append(sql_directory() / "schema/95_probe.sql")
    connection.add_log_listener(note)
    transaction = connection.transaction()
    await transaction.start()
    try:
        await connection.execute(
            f"set local lock_timeout = '{LOCK_TIMEOUT}'; set local statement_timeout = '{STATEMENT_TIMEOUT}'"
        )
        for file in files:
            await connection.execute(file.read_text())
    except _BUSY:
        return [Finding("schema", "info", "An image run was not tried: the tables are locked.", "Try again.")]
    except asyncpg.ObjectNotInPrerequisiteStateError as error:
        found = re.findall(r"^- (.*)\n  (.*)$", getattr(error, "detail", None) or "", re.MULTILINE)
        return [Finding("schema", "problem", sentence, cure) for sentence, cure in found]
    finally:
        await transaction.rollback()
        connection.remove_log_listener(note)
    if said:
        return [Finding("schema", "info", said[0])]
    tried = "An image run was tried from insert to cancel, and undone." if migrated else "Nothing is in the way."
    return [Finding("schema", "ok", tried)]


async def check_membership(connection: Connection) -> list[Finding]:
    """Look whether an application says who may see a workflow, by a function of its own in the place of ours."""
    schema = (sql_directory() / "schema/21_workflows.sql").read_text()
    ours = schema.partition("function image_jobs.my_workflows()")[2].split("$$")[1]
    body = await connection.fetchval("select prosrc from pg_proc where oid = 'image_jobs.my_workflows()'::regprocedure")
    if body.split() == ours.split():
        return []
    message = "The application says who may see a workflow: it has replaced image_jobs.my_workflows()."
    return [Finding("schema", "info", message, "Migrations leave it alone. Links alone open no workflow then.")]


async def check_limits(connection: Connection) -> list[Finding]:
    """Look for limits and blocks of providers and models that are not on offer: they hold nothing back."""
    rows = await connection.fetch(UNKNOWN)
    return [
        Finding(
            "limits",
            "problem",
            f"The row of image_jobs.{row['relation']} for {row['name']} holds nothing back: there is no such {row['what']}.",
            "Correct its name, as image_models has it, or delete the row.",
        )
        for row in rows
    ]


async def check_versions(connection: Connection) -> list[Finding]:
    """Look for living daemons that are older than this command, or too old for the schema."""
    rows = await connection.fetch(
        "select d.name, d.version, image_jobs.is_too_old(d.version) as too_old from image_jobs.daemon_status d"
        " where d.state in ('alive', 'draining') order by d.name, d.started_at"
    )
    here = version("image-job-orchestrator")
    findings: list[Finding] = []
    for row in rows:
        name, its = row["name"], row["version"]
        if row["too_old"]:
            cure = f"Update it to {here}, and restart it: once it has to register again, it is refused."
            findings.append(
                Finding("versions", "problem", f"The daemon {name} ({its}) is too old for the schema.", cure)
            )
        elif _numbers(its) < _numbers(here):
            message = f"The daemon {name} is of version {its}, older than this command ({here})."
            findings.append(Finding("versions", "info", message, "Update and restart it when it suits."))
    return findings


def _numbers(release: str) -> list[int]:
    found = re.match(r"\d+(\.\d+)*", release)
    return [int(number) for number in found[0].split(".")] if found else []
