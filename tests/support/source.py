"""The project's own source as the rules of the house read it: files, imports, docstrings, names."""

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeAlias

Graph: TypeAlias = Mapping[str, set[str]]
"""Module to the modules of ours that it imports, also inside functions."""

# What defines a name, with the name in group 1. Enough to find a word; nobody compiles this.
_SQL = re.compile(
    r"\b(?:function|table|view|type|trigger|sequence|index|constraint)\s+(?:if not exists\s+)?(?:public\.|image_jobs\.)?([a-z]\w+)"
    r"|\b([pv]_\w+)\b"
    r"|^  ([a-z]\w+) (?:text|bigint|integer|varchar|uuid|timestamptz|jsonb|boolean|numeric|interval|bytea|date)\b",
    re.MULTILINE,
)
_TYPESCRIPT = re.compile(r"\b(?:const|let|function|type|interface|class|enum)\s+([A-Za-z_]\w*)")
_COMMENT = re.compile(r"^[ \t]*-- ?(\S.*)(?:\n[ \t]*--.*)*", re.MULTILINE)
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")


@dataclass(frozen=True)
class Source:
    """One file, by its path in the repository."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def module(self) -> str:
        """The dotted name: `daemon/queue/__init__.py` is `daemon.queue`."""
        return self.path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")

    def docstrings(self) -> Iterator[tuple[int, str]]:
        """Yield line and text of each docstring, also below attributes; of SQL, of each comment that has lines of its own."""
        if self.path.endswith(".sql"):
            for found in _COMMENT.finditer(self.text):
                yield self.text.count("\n", 0, found.start()) + 1, found[1]
            return
        for node in ast.walk(self.tree):
            match node:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    yield node.lineno, text
                case _:
                    pass

    def tests(self) -> Iterator[tuple[int, str]]:
        """Yield line and name of each test."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test"):
                yield node.lineno, node.name

    def names(self) -> Iterator[tuple[int, str]]:
        """Yield line and name of everything that the file defines, and its own; imported names are others' words."""
        if self.path.endswith(".py"):
            yield 1, self.path.rpartition("/")[2].removesuffix(".py")
            yield from _python_names(self.tree)
        else:
            pattern = _SQL if self.path.endswith(".sql") else _TYPESCRIPT
            for found in pattern.finditer(self.text):
                name = next(group for group in found.groups() if group)
                yield self.text.count("\n", 0, found.start()) + 1, name


def read(root: Path, *patterns: str) -> list[Source]:
    """Read the files below `root` that match; what tools and builds have made is left out."""
    made = {"__pycache__", "node_modules", "dist"}
    paths = sorted({path for pattern in patterns for path in root.glob(pattern)})
    return [
        Source(path.relative_to(root).as_posix(), path.read_text())
        for path in paths
        if not made.intersection(path.parts)
    ]


def words(name: str) -> list[str]:
    """Split an identifier: `lookClosely`, `look_closely` and `LOOK_CLOSELY` are look, closely."""
    return [word.lower() for word in _WORD.findall(name)]


def imports(sources: list[Source]) -> Graph:
    """Return what each module imports of the others."""
    known = {source.module for source in sources}
    graph: dict[str, set[str]] = {source.module: set() for source in sources}
    for source in sources:
        for node in ast.walk(source.tree):
            match node:
                case ast.ImportFrom(module=str(module), names=names):
                    asked = {f"{module}.{name.name}" for name in names}
                    graph[source.module] |= {name if name in known else module for name in asked}
                case ast.Import(names=names):
                    graph[source.module] |= {name.name for name in names}
                case _:
                    pass
        graph[source.module] &= known
    return graph


def circle(graph: Graph) -> list[str]:
    """Return the modules of one circle of imports, in order; none if there is none."""
    done: set[str] = set()

    def visit(module: str, way: list[str]) -> list[str]:
        if module in way:
            return way[way.index(module) :]
        if module not in done:
            for other in sorted(graph.get(module, ())):
                if found := visit(other, [*way, module]):
                    return found
            done.add(module)
        return []

    return next((found for module in sorted(graph) if (found := visit(module, []))), [])


def _python_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield node.lineno, name
            case ast.arg(arg=name):
                yield node.lineno, name
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield node.lineno, name
            case _:
                pass
