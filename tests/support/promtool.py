"""Rules and queries, evaluated by promtool on series that were scraped."""

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path

from tests.support.postgres import ROOT

OBSERVABILITY = ROOT / "daemon/observability"
RULES = OBSERVABILITY / "alerts.yml"
MINUTES = 60
"""Of a course: what promtool evaluates, once a minute."""


def rule_names() -> list[str]:
    """Return the names of the alert rules."""
    return [line.split()[-1] for line in RULES.read_text().splitlines() if line.strip().startswith("- alert:")]


def dashboard_queries() -> list[str]:
    """Return every query of the dashboard."""
    panels = json.loads((OBSERVABILITY / "dashboard.json").read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel["targets"]]


def steady(scrape: Mapping[str, float]) -> dict[str, str]:
    """Return the course of a daemon that goes on as it was scraped: counters grow by what they are, gauges stay."""
    return {
        series: f"0+{value or 0}x{MINUTES}" if series.split("{")[0].endswith(("_total", "_bucket", "_count", "_sum")) else f"{value}x{MINUTES}"
        for series, value in scrape.items()
        if series.startswith("image_jobs_")
    }  # fmt: skip


def evaluate(course: Mapping[str, str], wanted: Mapping[str, float], folder: Path) -> None:
    """Evaluate queries at the end of a course, with the rules loaded; each has to have the value that is wanted."""
    series = [{"series": _with_instance(name), "values": values} for name, values in course.items()]
    queries = [
        {"expr": query, "eval_time": f"{MINUTES}m", "exp_samples": [{"labels": "{}", "value": value}]}
        for query, value in wanted.items()
    ]
    test = {"interval": "1m", "input_series": series, "promql_expr_test": queries}
    file = folder / "test.json"  # which is YAML, too
    file.write_text(json.dumps({"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": [test]}))
    done = subprocess.run(["promtool", "test", "rules", str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def firing(rule: str) -> str:
    """Return the query of how many alerts of a rule fire."""
    return f'count(ALERTS{{alertname="{rule}", alertstate="firing"}}) or vector(0)'


def has_values(query: str) -> str:
    """Return the query of whether a query has values: 1 if so."""
    return f"count({query}) > bool 0"


def _with_instance(series: str) -> str:
    """Add the label that Prometheus gives to what it scrapes."""
    name, brace, labels = series.partition("{")
    return f'{name}{{instance="daemon:9100",{labels}' if brace else f'{name}{{instance="daemon:9100"}}'
