"""Check of Storage: the bucket of images, whether it is public or private, and the private ones beside it."""

from daemon.cli.doctor.finding import Finding, failed
from daemon.errors import ImageJobsError
from daemon.settings import Settings

_IN_SQL = "in the dashboard under Storage, or by SQL in storage.buckets"


async def check_storage(settings: Settings) -> list[Finding]:
    """Look whether the key opens the buckets, whose pictures they show, and whether those beside them are private."""
    key = settings.service_role_key
    if settings.supabase_url is None or key is None:
        cure = "Both are in the project's API settings."
        return [Finding("storage", "problem", "SUPABASE_URL or SUPABASE_SERVICE_ROLE_KEY is not set.", cure)]
    from daemon.storage.addresses import SOURCES
    from daemon.storage.client import Storage

    url = settings.supabase_url
    beside = {
        settings.conversation_bucket: "images are refined without the conversation that made them",
        settings.kept_bucket: "the daemon makes it when a picture that was paid for cannot be decoded",
        SOURCES: "members can upload no pictures to start from",
    }
    findings: list[Finding] = []
    try:
        async with Storage(url, key.get_secret_value(), bucket=settings.bucket) as storage:
            await storage.check()
            findings.append(_mode(settings, public=await storage.visibility() is not False))
        for name, consequence in beside.items():
            async with Storage(url, key.get_secret_value(), bucket=name) as bucket:
                public = await bucket.visibility()
            if public is None:
                message = f"The bucket {name} is missing: {consequence}."
                findings.append(Finding("storage", "info", message, "Run image-jobs migrate."))
            elif public:
                state = "problem" if name == SOURCES else "info"
                message = f"The bucket {name} is public, and need not be."
                findings.append(Finding("storage", state, message, f"Make it private: {_IN_SQL}."))
    except ImageJobsError as error:
        return [failed("storage", error)]
    if len(findings) == 1 and findings[0].state == "ok":
        return [Finding("storage", "ok", f"{findings[0].message} Beside it: {', '.join(beside)}, at {url}.")]
    return findings


def _mode(settings: Settings, *, public: bool) -> Finding:
    """Say who sees the pictures, and where setting and bucket differ."""
    bucket = settings.bucket
    if settings.private and public:
        return Finding(
            "storage",
            "problem",
            f"IMAGE_JOBS_PRIVATE is set, but the bucket {bucket} is public: its pictures open for whoever has their addresses.",
            "Run image-jobs migrate, which makes it private.",
        )
    if public:
        return Finding(
            "storage", "ok", f"The bucket {bucket} is public: pictures open for whoever has their addresses."
        )
    if not settings.private:
        return Finding(
            "storage",
            "info",
            f"The bucket {bucket} is private, though IMAGE_JOBS_PRIVATE is not set: pictures open for members alone.",
            f"Set IMAGE_JOBS_PRIVATE=1, or make the bucket public: {_IN_SQL}.",
        )
    return Finding(
        "storage", "ok", f"The bucket {bucket} is private: pictures open for members of their workflow alone."
    )
