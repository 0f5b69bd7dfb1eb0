"""Check of what Storage and Realtime need of us: buckets, policies, publication."""

from daemon.cli.doctor.finding import Finding
from daemon.database import Connection
from daemon.migrate import Step, check_set_up


async def check_surroundings(connection: Connection, bucket: str, *, private: bool) -> list[Finding]:
    """Look for what `image-jobs migrate` makes around us, and could not make when it ran. Each has its SQL as cure."""
    steps = await check_set_up(connection, bucket, private=private)
    lacking = [step for step in steps if step.state != "there"]
    findings = [
        Finding(
            "set-up",
            "problem" if step.state == "missing" else "info",
            f"{step.title} is missing: {step.note}.",
            _cure(step),
        )
        for step in lacking
    ]
    return findings or [Finding("set-up", "ok", "Buckets, policies and publication are there.")]


def _cure(step: Step) -> str:
    if step.state == "absent":  # migrate leaves it so
        return f"Run: {step.command}"
    return f"Run image-jobs migrate{' when it is there' if step.state == 'later' else ''}, or as a role that may: {step.command}"
