"""The rules of the house: which room imports which, what tests are called, which words are in use.

A rule returns its breaches, one sentence each. Each is shown to find one, in a house of a file or two.
"""

import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from tests.support.source import Source, circle, imports, read, words

ROOT = Path(__file__).parents[1]

BASE = "base"
"""The modules beside the rooms: what everybody may import, and what imports none of the rooms."""
MAY_IMPORT = {
    BASE: set[str](),
    "queue": {BASE},
    "storage": {BASE},
    "fetch": {BASE},
    "images": {BASE},
    "providers": {BASE, "fetch"},
    "worker": {BASE, "queue", "storage", "fetch", "images", "providers"},
    "retention": {BASE, "queue", "storage"},
    "alerts": {BASE, "queue"},
    "service": {BASE, "queue", "storage", "fetch", "images", "providers", "worker", "retention", "alerts"},
    "pages": {BASE},
    "dev": {BASE, "providers", "pages"},
    "cli": {BASE, "storage", "providers", "service", "pages", "dev"},
    "__main__": {"cli"},
}
STARTS_DEV = "daemon.cli.operate"
"""The command `dev`: nothing else may need what only a developer's machine has."""
CALLS = {"generate", "check", "owner", "cancel"}
"""Methods of a provider that may cost money or time; `check_key` is free, and doctor may ask."""

LONGEST_NAME = 60
RIDDLE = re.compile(r"test_(what|who|whom|whoever|whose|nobody|somebody)(_|$)")
OPENING = re.compile(r"(What|Whoever|Nobody|Somebody)\b")

OUT_OF_USE = {
    "order": "provider job",
    "orders": "provider jobs",
    "turn": "sync",
    "turns": "syncs",
    "vendor": "ErrorMessages",
    "context": "conversation",
    "contexts": "conversations",
    "answer": "result, response or return value",
    "answers": "results",
    "thorough": "full_scan",
    "floor": "watermark",
    "via": "routed_to",
    "inbox": "orphans",
    "cleaning": "sanitize",
    "elsewhere": "should_fall_back",
    "wish": "pendingRunId",
    "bury": "markDeleted",
    "gone": "tombstones",
    "lantern": "one_file_provider",
    "strangers": "hostile_servers",
    "devs": "dev_process",
    "studio": "harness",
    "world": "harness",
    "hand": "writer",
}
WHOLE_NAMES = {
    "_CANNOT": "FALLBACK_CODES",
    "Shown": "NodeState",
    "Choices": "NodeInput",
    "Made": "RenderedNode",
}
MODULES = {"checks": "polling"}
"""Out of use as a module's name: what else is checked may be called so."""
PHRASES = {
    ("pass", "on"): "reroute_runs",
    ("going", "on"): "reroute_message",
    ("steps", "left"): "remaining_fallbacks",
    ("back", "off"): "retries",
    ("last", "word"): "SUBMIT_GRACE",
    ("look", "closely"): "resync",
    ("hang", "up"): "unsubscribe",
    ("listen", "anew"): "resubscribe",
}
EXCEPTIONS: dict[tuple[str, str], str] = {
    ("daemon/worker/worker.py", "hand_back"): "the verb: it gives runs back",
    ("tests/browser/test_sharing.py", "test_no_access_shows_when_membership_ends_elsewhere"): "in another browser",
    (
        "tests/dev/supabase/test_realtime_replay.py",
        "test_concurrent_messages_arrive_in_order_at_all_clients",
    ): "sequence",
    ("tests/dev/test_guard.py", "test_leaving_the_context_stops_no_process"): "Python's word for what `with` enters",
    (
        "tests/fetch/test_destinations.py",
        "test_a_configured_localhost_that_leads_elsewhere_is_refused",
    ): "another address",
    ("tests/providers/test_catalogue.py", "test_the_variable_that_is_said_to_turn_a_provider_on_does"): "to turn on",
    ("tests/sql/test_by_hand.py", "test_by_hand"): "written by hand, by operators",
    ("tests/sql/test_fairness.py", "test_workflows_of_a_user_take_turns"): "to take turns",
    ("tests/sql/test_usage_limits.py", "test_inserts_in_opposite_order_meet_no_deadlock"): "sequence",
    ("tests/test_indexes.py", "test_events_and_runs_are_locked_in_the_order_of_clients"): "sequence",
    ("tests/test_migrate.py", "test_pending_migrations_run_once_in_order"): "sequence",
    ("tests/test_migrate.py", "test_export_of_a_release_copies_its_new_files_in_order"): "sequence",
}
"""(path, name) → why this name may keep a word that is out of use everywhere else."""

VISIBLE = {"Dockerfile", "README.md", "daemon", "pyproject.toml", "sql", "tests"}


def room(module: str) -> str:
    """Return the room of a module: `daemon.queue.client` is in `queue`, `daemon.errors` in the base."""
    name = module.split(".")[1] if "." in module else BASE
    return name if name in MAY_IMPORT else BASE


def circles(sources: list[Source]) -> list[str]:
    """Find modules that import each other."""
    found = circle(imports(sources))
    return [f"import each other: {' → '.join(found)}"] if found else []


def upward_imports(sources: list[Source]) -> list[str]:
    """Find imports of a room that the importing room stands below, or beside."""
    return [
        f"{module} imports {other}"
        for module, others in imports(sources).items()
        for other in sorted(others)
        if room(other) != room(module) and room(other) not in MAY_IMPORT[room(module)]
    ]


def imports_of_dev(sources: list[Source]) -> list[str]:
    """Find imports of `daemon.dev` by anything but the command `dev`."""
    return [
        f"{module} imports {other}"
        for module, others in imports(sources).items()
        for other in sorted(others)
        if room(other) == "dev" != room(module) and module != STARTS_DEV
    ]


def calls_of_providers(sources: list[Source]) -> list[str]:
    """Find calls of a provider outside of the worker and the providers."""
    pattern = re.compile(rf"(?<![a-z])provider\w*(?:\[[^]]+\])?\.({'|'.join(sorted(CALLS))})\(")
    return [
        f"{source.path} calls {found[0]}…)"
        for source in sources
        if source.path.startswith("daemon/") and room(source.module) not in ("worker", "providers")
        for found in pattern.finditer(source.text)
    ]


def long_test_names(sources: list[Source]) -> list[str]:
    """Find tests whose names are longer than a line of a report."""
    return [
        f"{source.path}:{line} {name} ({len(name)})"
        for source in sources
        for line, name in source.tests()
        if len(name) > LONGEST_NAME
    ]


def riddles(sources: list[Source]) -> list[str]:
    """Find tests whose names ask instead of stating the behaviour."""
    return [f"{source.path}:{line} {name}" for source in sources for line, name in source.tests() if RIDDLE.match(name)]


def docstrings_that_open_badly(sources: list[Source]) -> list[str]:
    """Find docstrings, and comments of the schema, that do not say at once what the thing does."""
    return [
        f"{source.path}:{line} {text.splitlines()[0]}"
        for source in sources
        if source.path.endswith((".py", ".sql"))
        for line, text in source.docstrings()
        if OPENING.match(text)
    ]


def words_out_of_use(sources: list[Source]) -> list[str]:
    """Find identifiers with a word for which the field has a better one."""
    found: list[str] = []
    for source in sources:
        for line, name in source.names():
            if (source.path, name) in EXCEPTIONS:
                continue
            parts = words(name)
            whole = {name: WHOLE_NAMES[name]} if name in WHOLE_NAMES else {}
            if name in MODULES and source.path.endswith(f"/{name}.py"):
                whole[name] = MODULES[name]
            pairs = {pair: PHRASES[pair] for pair in pairwise(parts) if pair in PHRASES}
            single = {part: OUT_OF_USE[part] for part in parts if part in OUT_OF_USE}
            for word, better in {**whole, **single, **pairs}.items():
                said = word if isinstance(word, str) else "_".join(word)
                found.append(f"{source.path}:{line} {name}: not {said}, but {better}")
    return sorted(set(found))


def strays(sources: list[Source]) -> list[str]:
    """Find helpers of tests that do not stand where every helper stands."""
    helpers = ("tests/support/", "tests/fakes/", "tests/bench/")
    return [
        f"{source.path} belongs into tests/support"
        for source in sources
        if source.path.startswith("tests/")
        and not source.path.startswith(helpers)
        and not re.fullmatch(r"(test_\w+|conftest)\.py", source.path.rpartition("/")[2])
    ]


DAEMON = read(ROOT, "daemon/**/*.py")
PYTHON = [*DAEMON, *read(ROOT, "tests/**/*.py")]
ALL = [*PYTHON, *read(ROOT, "sql/schema/*.sql", "daemon/dev/canvas/*.ts*", "daemon/pages/**/*.ts*")]

Rule = Callable[[list[Source]], list[str]]

# Each rule, and the least that breaks it.
RULES: dict[Rule, list[Source]] = {
    circles: [
        Source("daemon/queue/outbox.py", "from daemon.queue.client import Queue"),
        Source("daemon/queue/client.py", "def f():\n    from daemon.queue import outbox"),
    ],
    upward_imports: [
        Source("daemon/queue/client.py", "from daemon.storage.client import Storage"),
        Source("daemon/storage/client.py", ""),
    ],
    imports_of_dev: [
        Source("daemon/cli/status.py", "from daemon.dev import postgres"),
        Source("daemon/dev/postgres.py", ""),
    ],
    calls_of_providers: [Source("daemon/service.py", "await providers[name].generate(request, report)")],
    long_test_names: [Source("tests/test_a.py", f"def test_{'a' * 56}(): ...")],
    riddles: [Source("tests/test_a.py", "def test_what_is_final(): ...")],
    docstrings_that_open_badly: [Source("daemon/log.py", 'def f():\n    """Whoever calls this."""')],
    words_out_of_use: [Source("daemon/log.py", "def place_order(): ...")],
    strays: [Source("tests/queue/helpers.py", "")],
}


OF_THE_DAEMON = {circles, upward_imports, imports_of_dev, calls_of_providers}
"""Rules about what runs; tests may import everything."""
OF_ALL_LANGUAGES = {docstrings_that_open_badly, words_out_of_use}
"""Rules that read SQL and TypeScript, too."""


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps_its_rules(rule: Rule) -> None:
    sources = DAEMON if rule in OF_THE_DAEMON else ALL if rule in OF_ALL_LANGUAGES else PYTHON
    assert rule(sources) == []


@pytest.mark.parametrize(("rule", "broken"), RULES.items(), ids=lambda it: getattr(it, "__name__", "broken"))
def test_each_rule_finds_a_breach(rule: Rule, broken: list[Source]) -> None:
    assert len(rule(broken)) == 1


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("sql/schema/a.sql", "create or replace function image_jobs.pass_on()"),
        ("sql/schema/a.sql", "create table public.runs (\n  via varchar\n)"),
        ("sql/schema/a.sql", "declare\n  v_order text;"),
        ("daemon/dev/canvas/a.ts", "function hangUp() {}"),
        ("daemon/a.py", "self.last_word = 1"),
        ("daemon/a.py", "def f(thorough): ..."),
        ("daemon/a.py", "_CANNOT = 1"),
        ("daemon/dev/canvas/a.ts", "interface Shown {}"),
        ("daemon/worker/checks.py", ""),
        ("daemon/queue/inbox.py", ""),
        ("tests/test_a.py", "def test_an_order_is_final(): ..."),
    ],
)
def test_words_out_of_use_are_found_in_every_language(path: str, text: str) -> None:
    assert len(words_out_of_use([Source(path, text)])) == 1


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("daemon/a.py", 'A = 1\n"""What else there is."""'),
        ("daemon/a.py", 'class A:\n    a: int\n    """Nobody reads it."""'),
        ("sql/schema/a.sql", "select 1;\n  -- What follows.\n  -- What is more."),
    ],
)
def test_bad_openings_are_found_wherever_prose_stands(path: str, text: str) -> None:
    assert len(docstrings_that_open_badly([Source(path, text)])) == 1


@pytest.mark.parametrize(
    "call",
    [
        "self._providers[job.provider].generate(request)",
        "parts._provider.check(job)",
        "provider.cancel(job)",
    ],
)
def test_calls_of_providers_are_found_however_they_are_held(call: str) -> None:
    assert len(calls_of_providers([Source("daemon/service.py", f"await {call}")])) == 1


@pytest.mark.parametrize("name", ["test_what", "test_whom_it_serves"])
def test_riddles_are_found(name: str) -> None:
    assert len(riddles([Source("tests/test_a.py", f"def {name}(): ...")])) == 1


def test_exceptions_are_in_use() -> None:
    names = {(source.path, name) for source in ALL for _, name in source.names()}
    assert EXCEPTIONS.keys() <= names


def test_each_room_has_a_room_of_tests() -> None:
    rooms = {path.name for path in (ROOT / "daemon").iterdir() if (path / "__init__.py").exists()}
    assert {name for name in rooms if not (ROOT / "tests" / name).is_dir()} == set()


def test_nothing_else_is_visible_at_the_top() -> None:
    visible = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    assert visible <= VISIBLE | {"build", "dist"}
