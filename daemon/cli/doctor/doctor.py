"""doctor: check everything the daemon needs."""

import asyncio
from dataclasses import asdict

import typer

from daemon.cli.console import AsJson, database_url, load_settings, print_json
from daemon.cli.doctor.database import (
    check_connections,
    check_listen,
    check_migrations,
    check_plugins,
    check_server,
)
from daemon.cli.doctor.finding import Finding, failed
from daemon.cli.doctor.keys import check_project_keys
from daemon.cli.doctor.providers import check_daemons, check_keys, configured_providers, living_daemons
from daemon.cli.doctor.schema import check_limits, check_membership, check_schema, check_versions
from daemon.cli.doctor.set_up import check_surroundings
from daemon.cli.doctor.storage import check_storage
from daemon.database import connected, refuse_transaction_pooler
from daemon.errors import ImageJobsError
from daemon.settings import Settings


def doctor(as_json: AsJson = False) -> None:
    """Examine everything the daemon needs, each with a cure.

    Example: image-jobs doctor
    """
    settings = load_settings()
    findings = asyncio.run(_examine(settings))
    if as_json:
        print_json([asdict(finding) for finding in findings])
    for finding in () if as_json else findings:
        colour = {"ok": "green", "info": "blue", "problem": "red"}[finding.state]
        typer.echo(f"{typer.style(f'{finding.state:<8}', fg=colour)} {finding.name:<12} {finding.message}")
        if finding.cure:
            typer.echo(f"{'':<21} {finding.cure}")
    if any(finding.state == "problem" for finding in findings):
        raise typer.Exit(1)


async def _examine(settings: Settings) -> list[Finding]:
    """Run the checks. Those of the tables run only if the schema is up to date."""
    from daemon.cli.doctor.webhooks import check_webhooks

    findings: list[Finding] = []
    served: dict[str, list[str]] = {}
    try:
        dsn = database_url(settings)
        refuse_transaction_pooler(dsn)
        async with connected(dsn) as connection:
            findings += [await check_server(dsn, connection), await check_listen(dsn, connection)]
            migrations = await check_migrations(dsn)
            findings.append(migrations)
            findings += await check_schema(connection, migrated=migrations.state == "ok")
            if migrations.state == "ok":
                findings += [*await check_membership(connection), *await check_versions(connection)]
                findings += await check_limits(connection)
                served = await living_daemons(connection)
                findings += await check_daemons(connection, served, await configured_providers(settings))
                findings.append(await check_connections(dsn, connection, len(served)))
                findings += await check_webhooks(settings, connection)
                findings += await check_surroundings(connection, settings.bucket, private=settings.private)
                findings += await check_plugins(connection)
    except ImageJobsError as error:
        findings.append(failed("database", error))
    findings += [*check_project_keys(settings), *await check_storage(settings), *await check_keys(settings, served)]
    return findings
