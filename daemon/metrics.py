"""Exports metrics to Prometheus, where a port is set. What has happened is what the database says has become of runs and calls.

Over all daemons each run and each call is counted once: the sum over instances is the truth. What is the queue's (`waiting`,
`oldest_waiting_seconds`, `provider_closed`) each daemon shows alike: take the maximum.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING

from daemon.errors import ImageJobsError
from daemon.run import ClaimedRun, Fate

if TYPE_CHECKING:
    from prometheus_client.core import Metric

BUCKETS = (0.1, 0.5, 1, 2, 5, 10, 20, 40, 60, 120, 300, 600)
"""Seconds: an image takes one to a hundred of them, its way from storage to the node less."""

OTHER = "other"
"""Label of a provider, or a model, that is not in the registry; anybody may insert a run."""
STAGES = {"queuedMs": "queued", "generateMs": "generate", "storeMs": "store", "settleMs": "settle"}
_CODE = re.compile(r"[a-z0-9_]{1,40}")
MOST_CODES = 200
"""Codes are words of ours, a few dozens: should one come from elsewhere, its like must not fill the memory."""


@dataclass(frozen=True, slots=True)
class Tally:
    """An event that no settlement of this daemon says: one row of `image_jobs.take_tallies`."""

    metric: str
    provider: str
    result: str
    count: int
    model: str = ""
    code: str | None = None
    usd: float | None = None
    run_id: str | None = None
    workflow_id: str | None = None
    node_id: str | None = None
    error: str | None = None
    logged: bool = False


@dataclass(frozen=True, slots=True)
class Gauge:
    """A value of the queue: one row of `image_jobs.gauges`."""

    gauge: str
    provider: str
    value: float
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Process:
    """The state of this process, at the moment at which it is scraped."""

    slots: int
    held: int
    outbox: int
    listener_connected: bool
    last_beat_seconds: float
    uploads_stored: int
    uploads_failed: int
    base64_refused: int


class Metrics:
    """Counts what has happened. Never by run: labels are few.

    Args:
        port: Where to serve `/metrics`; None counts nothing.

    Raises:
        ImageJobsError: If the extra `metrics` is not installed, or the port is taken.
    """

    def __init__(self, port: int | None) -> None:
        self.served = port is not None
        self._models: Mapping[str, Collection[str]] = {}
        self._codes: set[str] = set()
        self._base64 = 0
        self._gauges: Sequence[Gauge] = ()
        self._process: Callable[[], Process] | None = None
        if port is None:
            return
        try:
            import prometheus_client as prometheus
        except ImportError as error:
            raise ImageJobsError(
                "IMAGE_JOBS_METRICS_PORT is set, but prometheus-client is not installed.",
                "Install the extra: pip install 'image-job-orchestrator[metrics]'.",
            ) from error
        prometheus.disable_created_metrics()
        self.registry = registry = prometheus.CollectorRegistry()
        prometheus.ProcessCollector(registry=registry)
        self._runs = prometheus.Counter(
            "image_jobs_runs", "Runs that ended", ["provider", "model", "outcome", "code"], registry=registry
        )
        self._attempts = prometheus.Counter(
            "image_jobs_attempts", "Attempts after which the run goes on", ["provider", "outcome"], registry=registry
        )
        self._stages = prometheus.Histogram(
            "image_jobs_stage_seconds",
            "Of completed runs: in line, at the provider, to storage, from there to the node",
            ["provider", "stage"],
            buckets=BUCKETS,
            registry=registry,
        )
        self._calls = prometheus.Counter(
            "image_jobs_calls", "Requests to providers", ["provider", "model", "state"], registry=registry
        )
        self._usd = prometheus.Counter(
            "image_jobs_usd",
            "USD: the cost of charged calls, the estimate of unknown ones",
            ["provider", "model", "state"],
            registry=registry,
        )
        self._webhooks = prometheus.Counter(
            "image_jobs_webhooks", "Deliveries of providers", ["provider", "result"], registry=registry
        )
        prometheus.Info("image_jobs_build", "The version", registry=registry).info(
            {"version": version("image-job-orchestrator")}
        )
        registry.register(self)
        try:
            prometheus.start_http_server(port, registry=registry)
        except OSError as error:
            raise ImageJobsError(
                f"Port {port} for metrics is taken.", "Set IMAGE_JOBS_METRICS_PORT to a free one."
            ) from error

    def watch(self, models: Mapping[str, Collection[str]], process: Callable[[], Process]) -> None:
        """Name the models of each provider, which may be labels, and read the state of this process from now on."""
        self._models = models
        self._process = process

    def settled(self, run: ClaimedRun, fate: Fate) -> None:
        """Count what the database says has become of a run of ours."""
        if not self.served:
            return
        provider, model = self._labels(*(run.processor or "").partition(":")[::2])
        if fate.outcome not in ("completed", "failed", "cancelled"):
            self._attempts.labels(provider, fate.outcome).inc()
            return
        self._runs.labels(provider, model, fate.outcome, self._code(fate)).inc()
        # Of a run that failed the last stage is as long as it took to fail: another thing.
        for name, milliseconds in (fate.timings or {}).items():
            if name in STAGES and fate.outcome == "completed":
                self._stages.labels(provider, STAGES[name]).observe(milliseconds / 1000)

    def tally(self, tally: Tally) -> None:
        """Count what has happened elsewhere."""
        if not self.served:
            return
        provider, model = self._labels(tally.provider, tally.model)
        match tally.metric:
            case "runs":
                code = self._known_code(tally.code) if tally.result == "failed" else ""
                self._runs.labels(provider, model, tally.result, code).inc(tally.count)
            case "calls":
                self._calls.labels(provider, model, tally.result).inc(tally.count)
                if tally.usd:
                    self._usd.labels(provider, model, tally.result).inc(tally.usd)
            case "webhooks":
                hook = tally.provider if tally.provider in (*self._models, "hmac") else OTHER
                self._webhooks.labels(hook, tally.result).inc(tally.count)
            case _:
                self._base64 += tally.count

    def show(self, gauges: Sequence[Gauge]) -> None:
        """Show these values of the queue; none while the database cannot say."""
        self._gauges = gauges

    def collect(self) -> "Iterable[Metric]":
        """Return what is true at the moment, for a scrape: called by a thread of the metrics' server."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        process = self._process() if self._process is not None else None
        if process is not None:
            yield GaugeMetricFamily("image_jobs_slots", "Runs that this daemon may hold", process.slots)
            yield GaugeMetricFamily("image_jobs_held", "Runs that it holds", process.held)
            yield GaugeMetricFamily("image_jobs_outbox", "Entries that wait to be written", process.outbox)
            yield GaugeMetricFamily(
                "image_jobs_listener_connected", "1 while it hears of new runs", int(process.listener_connected)
            )
            yield GaugeMetricFamily(
                "image_jobs_last_beat_seconds", "Since its last beat arrived", process.last_beat_seconds
            )
            refused = CounterMetricFamily("image_jobs_base64_refused", "Texts and nodes that the base64 rule kept out")
            refused.add_metric([], process.base64_refused + self._base64)
            yield refused
            uploads = CounterMetricFamily("image_jobs_uploads", "Uploads tried", labels=["result"])
            uploads.add_metric(["stored"], process.uploads_stored)
            uploads.add_metric(["failed"], process.uploads_failed)
            yield uploads
        waiting = GaugeMetricFamily("image_jobs_waiting", "Runs that could start now", labels=["provider"])
        oldest = GaugeMetricFamily(
            "image_jobs_oldest_waiting_seconds", "How long the oldest of them has been due", labels=["provider"]
        )
        closed = GaugeMetricFamily(
            "image_jobs_provider_closed", "1 while nothing of it starts", labels=["provider", "reason"]
        )
        families = {"waiting": waiting, "oldest_waiting": oldest}
        sums: dict[tuple[str, str], float] = {}
        for gauge in self._gauges:
            provider, _ = self._labels(gauge.provider, "")
            if gauge.gauge == "closed":
                closed.add_metric([provider, gauge.reason or ""], gauge.value)
            else:
                before = sums.get((gauge.gauge, provider), 0.0)
                value = before + gauge.value if gauge.gauge == "waiting" else max(before, gauge.value)
                sums[gauge.gauge, provider] = value
        for (name, provider), value in sums.items():
            families[name].add_metric([provider], value)
        yield from (waiting, oldest, closed)

    def _labels(self, provider: str, model: str) -> tuple[str, str]:
        models = self._models.get(provider)
        if models is None:
            return OTHER, OTHER
        return provider, model if model in models else OTHER

    def _code(self, fate: Fate) -> str:
        return self._known_code(fate.code) if fate.outcome == "failed" else ""

    def _known_code(self, code: str | None) -> str:
        """Return the label of a code."""
        if code is None or not _CODE.fullmatch(code):
            return OTHER
        if code not in self._codes and len(self._codes) >= MOST_CODES:
            return OTHER
        self._codes.add(code)
        return code
