"""A workflow's nodes as a client keeps them: merged by version, so that nothing ever goes back.

Messages are lost, late and doubled; answers to a request are older than messages that came meanwhile. The database lets
a node's version only grow, and gives no two changes the same one: that decides what is news.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SHOWN = ("status", "progress", "message", "imageUrl", "thumbnailUrl", "error", "runId")
"""What of a node is worth a line when it changes; its preview and its position are not."""


@dataclass(frozen=True, slots=True)
class Node:
    """What a node shows of its newest run, at one version."""

    id: str
    version: int
    data: Mapping[str, Any]
    deleted: bool = False

    @property
    def unfinished(self) -> bool:
        return self.data.get("status") in ("pending", "running")

    @property
    def shown(self) -> dict[str, Any]:
        return {name: self.data[name] for name in SHOWN if name in self.data}


class Nodes:
    """All nodes of one workflow."""

    def __init__(self) -> None:
        self._known: dict[str, Node] = {}
        self._gone: dict[str, int] = {}

    @property
    def unfinished(self) -> bool:
        """Whether an image is under way."""
        return any(node.unfinished for node in self._known.values())

    def hear(self, changed: Sequence[Mapping[str, Any]]) -> list[Node]:
        """Takes rows, or the nodes of a message, which may be parts of rows. Answers what looks different now."""
        news = (self._take(each) for each in changed)
        return [node for node in news if node is not None]

    def load(self, rows: Sequence[Mapping[str, Any]]) -> list[Node]:
        """Takes all rows there are: what is not among them was deleted. Answers what looks different now."""
        news = self.hear(rows)
        for missing in self._known.keys() - {row["id"] for row in rows}:
            news.append(self._bury(missing, self._known[missing].version))
        return news

    def _take(self, row: Mapping[str, Any]) -> Node | None:
        node = Node(row["id"], row["version"], row.get("node_data") or {})
        known = self._known.get(node.id)
        if node.version <= max(self._gone.get(node.id, 0), known.version if known else 0):
            return None
        if row.get("deleted"):
            buried = self._bury(node.id, node.version)
            return buried if known else None
        self._gone.pop(node.id, None)
        self._known[node.id] = node
        return None if known and known.shown == node.shown else node

    def _bury(self, node_id: str, version: int) -> Node:
        self._known.pop(node_id, None)
        self._gone[node_id] = version
        return Node(node_id, version, {}, deleted=True)
