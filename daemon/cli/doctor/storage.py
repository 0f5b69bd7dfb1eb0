"""Check of Storage: the public bucket of images, and the private ones beside it."""

from daemon.cli.doctor.finding import Finding, failed
from daemon.errors import ImageJobsError
from daemon.settings import Settings


async def check_storage(settings: Settings) -> Finding:
    """Look whether the key opens the buckets, and whether those beside the images are private."""
    key = settings.service_role_key
    if settings.supabase_url is None or key is None:
        return Finding(
            "storage",
            "problem",
            "SUPABASE_URL or SUPABASE_SERVICE_ROLE_KEY is not set.",
            "Both are in the project's API settings.",
        )
    from daemon.storage.client import Storage

    url = settings.supabase_url
    private = {
        settings.conversation_bucket: "images are refined without the conversation that made them",
        settings.kept_bucket: "the daemon makes it when a picture that was paid for cannot be decoded",
    }
    try:
        async with Storage(url, key.get_secret_value(), bucket=settings.bucket) as storage:
            await storage.check()
        for name, consequence in private.items():
            async with Storage(url, key.get_secret_value(), bucket=name) as bucket:
                public = await bucket.visibility()
            if public is None:
                return Finding(
                    "storage", "info", f"The bucket {name} is missing: {consequence}.", "Run image-jobs migrate."
                )
            if public:
                cure = "Make it private: in the dashboard under Storage, or by SQL in storage.buckets."
                return Finding("storage", "info", f"The bucket {name} is public, and need not be.", cure)
    except ImageJobsError as error:
        return failed("storage", error)
    return Finding("storage", "ok", f"Buckets {settings.bucket}, {' and '.join(private)} at {url}.")
