"""In whatever sequence messages and responses come, an older version never replaces a newer one."""

from hypothesis import given
from hypothesis import strategies as st

from daemon.cli.watch.nodes import Nodes


def row(version: int, status: str = "running", node_id: str = "a", **data: object) -> dict[str, object]:
    return {"id": node_id, "version": version, "node_data": {"status": status, **data}}


def tombstone(version: int, node_id: str = "a") -> dict[str, object]:
    return {"id": node_id, "version": version, "deleted": True}


@given(st.permutations(range(1, 8)), st.lists(st.integers(1, 7), max_size=5))
def test_late_and_doubled_messages_change_nothing(sequence: list[int], again: list[int]):
    nodes = Nodes()
    versions = [news.version for each in [*sequence, *again] for news in nodes.merge([row(each, progress=each)])]
    assert versions == sorted(set(versions))
    assert versions[-1] == 7


def test_a_refetch_finds_missed_changes():
    nodes = Nodes()
    nodes.merge([row(1), row(2, node_id="b")])
    news = nodes.load([row(5, "completed"), row(4, node_id="c")])
    assert [(node.id, node.version, node.deleted) for node in news] == [
        ("a", 5, False),
        ("c", 4, False),
        ("b", 2, True),
    ]


def test_a_response_older_than_a_message_changes_nothing():
    nodes = Nodes()
    nodes.merge([row(5, "completed")])
    assert nodes.load([row(3)]) == []


def test_a_deleted_node_comes_back_only_when_recreated():
    nodes = Nodes()
    nodes.merge([row(1)])
    assert [node.deleted for node in nodes.merge([tombstone(3)])] == [True]
    assert nodes.merge([row(2), row(3), tombstone(3)]) == []
    assert [node.version for node in nodes.merge([row(4)])] == [4]


def test_the_deletion_of_an_unknown_node_is_ignored():
    assert Nodes().merge([tombstone(3)]) == []


def test_a_new_position_or_preview_is_not_printed():
    nodes = Nodes()
    nodes.merge([row(1, progress=5)])
    assert nodes.merge([row(2, progress=5, previewUrl="https://example.com/1.webp", model="painter")]) == []


def test_unfinished_until_the_last_run_has_ended():
    nodes = Nodes()
    nodes.merge([row(1, "pending"), row(2, "running", "b")])
    nodes.merge([row(3, "completed")])
    assert nodes.unfinished
    nodes.merge([row(4, "error", "b")])
    assert not nodes.unfinished
