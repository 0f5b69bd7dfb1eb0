"""A client's copy of a workflow's nodes, merged by version: an older version never replaces a newer one.

Messages are lost, late and doubled; the response to a request is older than messages that came meanwhile. The database
lets a node's version only grow, and gives no two changes the same one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SHOWN = ("status", "progress", "message", "imageUrl", "thumbnailUrl", "error", "runId")
"""The keys of `node_data` whose change is printed; a new preview or position is not."""


@dataclass(frozen=True, slots=True)
class Node:
    """A node at one version."""

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
        self._tombstones: dict[str, int] = {}

    @property
    def unfinished(self) -> bool:
        """Whether a run of any node is pending or running."""
        return any(node.unfinished for node in self._known.values())

    @property
    def pending(self) -> list[Node]:
        """The nodes whose run is in line."""
        return [node for node in self._known.values() if node.data.get("status") == "pending"]

    def merge(self, changed: Sequence[Mapping[str, Any]]) -> list[Node]:
        """Merge rows, or the nodes of a message, which may be parts of rows. Return the nodes that look different now."""
        news = (self._merge_one(each) for each in changed)
        return [node for node in news if node is not None]

    def load(self, rows: Sequence[Mapping[str, Any]]) -> list[Node]:
        """Merge all rows of the workflow: a node without a row was deleted. Return the nodes that look different now."""
        news = self.merge(rows)
        for missing in self._known.keys() - {row["id"] for row in rows}:
            news.append(self._mark_deleted(missing, self._known[missing].version))
        return news

    def _merge_one(self, row: Mapping[str, Any]) -> Node | None:
        node = Node(row["id"], row["version"], row.get("node_data") or {})
        known = self._known.get(node.id)
        if node.version <= max(self._tombstones.get(node.id, 0), known.version if known else 0):
            return None
        if row.get("deleted"):
            deleted = self._mark_deleted(node.id, node.version)
            return deleted if known else None
        self._tombstones.pop(node.id, None)
        self._known[node.id] = node
        return None if known and known.shown == node.shown else node

    def _mark_deleted(self, node_id: str, version: int) -> Node:
        self._known.pop(node_id, None)
        self._tombstones[node_id] = version
        return Node(node_id, version, {}, deleted=True)
