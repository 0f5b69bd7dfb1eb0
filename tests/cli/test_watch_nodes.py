"""Whatever order messages and answers come in, a node never goes back."""

from hypothesis import given
from hypothesis import strategies as st

from daemon.cli.nodes import Nodes


def row(version: int, status: str = "running", node_id: str = "a", **data: object) -> dict[str, object]:
    return {"id": node_id, "version": version, "node_data": {"status": status, **data}}


def gone(version: int, node_id: str = "a") -> dict[str, object]:
    return {"id": node_id, "version": version, "deleted": True}


@given(st.permutations(range(1, 8)), st.lists(st.integers(1, 7), max_size=5))
def test_late_and_doubled_messages_change_nothing(order: list[int], again: list[int]):
    nodes = Nodes()
    versions = [news.version for each in [*order, *again] for news in nodes.hear([row(each, progress=each)])]
    assert versions == sorted(set(versions))
    assert versions[-1] == 7


def test_what_was_missed_is_found_when_everything_is_fetched():
    nodes = Nodes()
    nodes.hear([row(1), row(2, node_id="b")])
    news = nodes.load([row(5, "completed"), row(4, node_id="c")])
    assert [(node.id, node.version, node.deleted) for node in news] == [
        ("a", 5, False),
        ("c", 4, False),
        ("b", 2, True),
    ]


def test_an_answer_that_is_older_than_a_message_changes_nothing():
    nodes = Nodes()
    nodes.hear([row(5, "completed")])
    assert nodes.load([row(3)]) == []


def test_a_node_that_was_deleted_stays_so_until_it_is_made_anew():
    nodes = Nodes()
    nodes.hear([row(1)])
    assert [node.deleted for node in nodes.hear([gone(3)])] == [True]
    assert nodes.hear([row(2), row(3), gone(3)]) == []
    assert [node.version for node in nodes.hear([row(4)])] == [4]


def test_the_end_of_a_node_that_nobody_has_seen_is_no_news():
    assert Nodes().hear([gone(3)]) == []


def test_a_position_or_a_preview_is_not_worth_a_line():
    nodes = Nodes()
    nodes.hear([row(1, progress=5)])
    assert nodes.hear([row(2, progress=5, previewUrl="https://example.com/1.webp", model="painter")]) == []


def test_an_image_is_under_way_until_the_last_one_has_ended():
    nodes = Nodes()
    nodes.hear([row(1, "pending"), row(2, "running", "b")])
    nodes.hear([row(3, "completed")])
    assert nodes.unfinished
    nodes.hear([row(4, "error", "b")])
    assert not nodes.unfinished
