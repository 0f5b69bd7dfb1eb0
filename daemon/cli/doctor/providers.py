"""Checks of the providers: do they accept the keys, and does a living daemon serve them."""

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING

from daemon.cli.doctor.finding import Finding, failed
from daemon.database import Connection
from daemon.errors import ImageJobsError, Refused, RunError
from daemon.settings import Settings

if TYPE_CHECKING:
    from daemon.providers import Provider

RESPONSE_TIMEOUT = 10.0
"""Seconds for a provider to say whether it accepts the key."""

WAITING = """
select split_part(w.name, ':', 1) as provider, sum(w.runs)::bigint as runs
from (
  select coalesce(r.routed_to, r.processor) as name, count(*) as runs from public.runs r
  where r.queue_state = 'pending' and r.kind = 'image_gen' and r.rank is not null
    and r.due_at <= (select image_jobs.now())
  group by 1
  union all
  select coalesce(r.routed_to, r.processor), count(*) from public.runs r
  where r.queue_state = 'pending' and r.kind = 'image_gen' and r.rank is null and r.due_at <= (select image_jobs.now())
  group by 1
  union all
  select coalesce(r.routed_to, r.processor), count(*) from public.runs r
  where r.queue_state = 'running' and r.kind = 'image_gen' and not exists (
    select from image_jobs.daemon_status d where d.id = r.claimed_by and d.state in ('alive', 'draining'))
  group by 1
) w
group by 1 order by 1"""
"""Runs that a daemon should be at, by provider. Each part is an index."""

Served = Mapping[str, list[str]]
"""Daemons that are alive, by their names and ids, with the providers that each serves."""


async def living_daemons(connection: Connection) -> dict[str, list[str]]:
    """Return the daemons that are alive, with the providers that each serves."""
    rows = await connection.fetch(
        "select name, id::text, providers from image_jobs.daemon_status where state = 'alive' order by name, started_at"
    )
    names = [row["name"] for row in rows]
    return {
        row["name"] if names.count(row["name"]) == 1 else f"{row['name']} ({row['id'][:8]})": sorted(row["providers"])
        for row in rows
    }


async def check_daemons(connection: Connection, served: Served, configured: list[str]) -> list[Finding]:
    """Compare the providers that runs wait for, and those with a key here, with what living daemons serve."""
    rows = await connection.fetch(WAITING)
    waiting: dict[str, int] = {row["provider"]: row["runs"] for row in rows}
    if not served:
        runs = _runs(sum(waiting.values()))
        cure = "Start one where the keys are: image-jobs run."
        if waiting:
            return [Finding("daemons", "problem", f"No daemon is alive, and {runs} for one.", cure)]
        return [Finding("daemons", "problem", "No daemon is alive; no run waits for one.", cure)]
    each = "; ".join(f"{name} serves {', '.join(providers) or 'nothing'}" for name, providers in served.items())
    findings = [Finding("daemons", "info", f"{len(served)} alive: {each}.")]
    everywhere = {provider for providers in served.values() for provider in providers}
    for provider in sorted({*waiting, *configured} - everywhere):
        missing = f"No daemon that is alive serves {provider}"
        if provider in waiting:
            cure = f"{_setting(provider)} where the daemon runs, and restart it."
            findings.append(Finding("daemons", "problem", f"{missing}, and {_runs(waiting[provider])} for it.", cure))
        else:
            cure = f"{_setting(provider)} where the daemon runs, too, and restart it."
            findings.append(Finding("daemons", "info", f"{missing}, though it has a key here.", cure))
    return sorted(findings, key=_severity)


async def configured_providers(settings: Settings) -> list[str]:
    """Return the providers that have a key here; none where one of them cannot be set up, which `check_keys` reports."""
    from daemon.providers import available

    try:
        return await available(settings)
    except ImageJobsError:
        return []


async def check_keys(settings: Settings, served: Served) -> list[Finding]:
    """Ask each provider that has a key here whether it accepts it, by a request that is free.

    Args:
        settings: With the keys.
        served: The daemons that are alive: where they serve some, having no key here is no problem.
    """
    from daemon.providers import PROVIDERS, setting

    findings = await asyncio.gather(*(_check_key(name, settings) for name in PROVIDERS))
    found = [finding for finding in findings if finding is not None]
    if found:
        return sorted(found, key=_severity)
    everywhere = sorted({provider for providers in served.values() for provider in providers})
    if everywhere:
        message = f"None has a key here; the daemons that live serve {', '.join(everywhere)}."
        return [Finding("providers", "info", message)]
    keys = [setting(name) for name in PROVIDERS if name != "demo"]
    cure = f"Set {' or '.join(keys)}; IMAGE_JOBS_DEMO=1 offers demo:painter, which needs none."
    return [Finding("providers", "problem", "No provider has a key.", cure)]


async def _check_key(name: str, settings: Settings) -> Finding | None:
    """Return the finding of one provider; None where it has no key here."""
    from daemon.providers import create

    try:
        provider = create(name, settings)
    except ImageJobsError as error:
        return failed("providers", error)
    except Exception as error:  # noqa: BLE001 - an SDK that cannot be imported costs its provider, here as in the daemon
        return Finding("providers", "problem", f"{name}: its code cannot be loaded ({error}).", "Install it again.")
    if provider is None:
        return None
    try:
        async with asyncio.timeout(RESPONSE_TIMEOUT):
            return await _ask(name, provider)
    except TimeoutError:
        return _not_asked(name, f"No response within {RESPONSE_TIMEOUT:.0f} s.")
    finally:
        await provider.aclose()


async def _ask(name: str, provider: "Provider") -> Finding:
    """Return what a provider says to the key."""
    from daemon.providers import KeyChecked

    if not isinstance(provider, KeyChecked):
        return Finding("providers", "ok", f"{name}: set up; whether it accepts a key cannot be asked.")
    try:
        await provider.check_key()
    except RunError as error:
        if isinstance(error, Refused) and error.code in ("authentication", "permission"):
            return Finding("providers", "problem", f"{name}: {error.message}", error.data.get("cure", error.hint))
        return _not_asked(name, error.message)
    return Finding("providers", "ok", f"{name}: the key is accepted.")


def _severity(finding: Finding) -> int:
    """Return the place of a finding among those of its name: the problems come last, next to the prompt."""
    return ("ok", "info", "problem").index(finding.state)


def _not_asked(name: str, reason: str) -> Finding:
    return Finding("providers", "info", f"{name}: whether the key is accepted is not known. {reason}")


def _setting(provider: str) -> str:
    """Return how to turn a provider on."""
    from daemon.providers import PROVIDERS, setting

    if provider not in PROVIDERS:
        return "Cancel these runs, or add the provider"
    return "Set IMAGE_JOBS_DEMO=1" if provider == "demo" else f"Set {setting(provider)}"


def _runs(count: int) -> str:
    return f"{count} run{'s' * (count != 1)} wait{'s' * (count == 1)}"
