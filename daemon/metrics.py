"""Exports metrics to Prometheus, where a port is set; the rest are views (`queue_stats`, `run_timings`, `run_costs`)."""

from collections.abc import Collection

from daemon.errors import ImageJobsError
from daemon.run import ClaimedRun

BUCKETS = (0.5, 1, 2, 5, 10, 20, 40, 60, 120, 300, 600)
"""Seconds: an image takes one to a hundred of them."""


OTHER = "other"
"""Label of a provider that is not in the registry."""


class Metrics:
    """Counts the runs of this daemon. Never by run: labels are few.

    Args:
        port: Where to serve `/metrics`; None counts nothing.
        providers: Names that may be labels; all others are `other`, since anybody may insert a run.

    Raises:
        ImageJobsError: If the extra `metrics` is not installed, or the port is taken.
    """

    def __init__(self, port: int | None, providers: Collection[str] = ()) -> None:
        self._serving = port is not None
        self._providers = providers
        if port is None:
            return
        try:
            from prometheus_client import Counter, Histogram, start_http_server
        except ImportError as error:
            raise ImageJobsError(
                "IMAGE_JOBS_METRICS_PORT is set, but prometheus-client is not installed.",
                "Install the extra: pip install 'image-job-orchestrator[metrics]'.",
            ) from error
        self._finished = Counter("image_jobs_runs_finished", "Runs that this daemon settled", ["provider", "outcome"])
        self._seconds = Histogram("image_jobs_run_seconds", "From claim to settlement", ["provider"], buckets=BUCKETS)
        self._waited = Histogram("image_jobs_queue_seconds", "From due to claimed", buckets=BUCKETS)
        try:
            start_http_server(port)
        except OSError as error:
            raise ImageJobsError(
                f"Port {port} for metrics is taken.", "Set IMAGE_JOBS_METRICS_PORT to a free one."
            ) from error

    def finished(self, run: ClaimedRun, outcome: str, seconds: float) -> None:
        """Count a run that was settled with `outcome`, `seconds` after its claim."""
        if not self._serving:
            return
        name = (run.processor or "").partition(":")[0]
        provider = name if name in self._providers else OTHER
        self._finished.labels(provider, outcome).inc()
        self._seconds.labels(provider).observe(seconds)
        self._waited.observe(run.waited.total_seconds())
