"""Find the regular expressions of the code, and texts that might make one slow."""

import ast
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from itertools import product
from pathlib import Path
from re import _parser as parser  # pyright: ignore[reportAttributeAccessIssue]
from typing import Any

_USES = ("match", "fullmatch", "search", "sub", "subn", "split", "findall", "finditer")
_MOST_CHARACTERS = 14
_OTHER = "\x01"
"""A character that few patterns have."""


@dataclass(frozen=True)
class Found:
    """A regular expression of the code: where it stands, and by which methods it is used."""

    path: str
    line: int
    pattern: re.Pattern[Any]
    uses: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.path}:{self.line} {self.pattern.pattern!r}"


def found_in(root: Path, path: Path, samples: Mapping[str, tuple[str | bytes, ...]]) -> list[Found]:
    """Return the regular expressions of a module.

    Args:
        root: The repository.
        path: The module's file; it is imported.
        samples: Source of a pattern that is made in a function → patterns such as it makes.
    """
    text = path.read_text("utf-8")
    names = vars(import_module(".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")))
    found: list[Found] = []
    for node in ast.walk(ast.parse(text)):
        if not (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
            and node.func.value.id == "re"
            and node.func.attr in (*_USES, "compile")
        ):
            continue
        source = ast.unparse(node.args[0])
        given: list[Any] = [source] if source in samples else []
        patterns = samples[source] if given else (_evaluated(node.args[0], names),)
        at = {"compile": 1, "sub": 4, "subn": 4, "split": 3}.get(node.func.attr, 2)
        flags = next((word.value for word in node.keywords if word.arg == "flags"), None) or dict(
            enumerate(node.args)
        ).get(at)
        options = 0 if flags is None else _evaluated(flags, names)
        for pattern in patterns:
            uses = (node.func.attr,) if node.func.attr != "compile" else _uses(text, node)
            found.append(Found(str(path.relative_to(root)), node.lineno, re.compile(pattern, options), uses))
    return found


def _evaluated(node: ast.expr, names: Mapping[str, Any]) -> Any:
    return eval(compile(ast.Expression(node), "pattern", "eval"), dict(names))


def _uses(text: str, node: ast.Call) -> tuple[str, ...]:
    """Return the methods that are called on the name of a compiled pattern; `search`, the slowest, if none is."""
    line = text.splitlines()[node.lineno - 1]
    name = re.match(r"\s*(\w+)\s*=", line)
    uses = set(re.findall(rf"\b{name[1]}\.({'|'.join(_USES)})\b", text)) if name else set()
    return tuple(sorted(uses)) or ("search",)


@dataclass(frozen=True)
class Shape:
    """Texts of any length: a unit that is repeated, and what stands around it."""

    before: str
    unit: str
    after: str

    def text(self, length: int) -> str:
        """Return a text of about this length."""
        return self.before + self.unit * (length // len(self.unit)) + self.after

    def __str__(self) -> str:
        return f"{self.before!r} + n * {self.unit!r} + {self.after!r}"


def shapes_for(pattern: re.Pattern[Any], *, most: int = _MOST_CHARACTERS) -> Iterator[Shape]:
    """Yield texts of the alphabet of a pattern: each of its characters and words repeated, alone and with others."""
    characters, words = _alphabet(pattern, most)
    units = {*characters, *map("".join, product(characters, repeat=2)), *words}
    for word in words:
        units |= {word + one + other for one in characters for other in ("", ":", " ")}
        units |= {one + word for one in characters}
    for unit in sorted(units):
        for before, after in product(("", *words[:2]), ("", _OTHER)):
            yield Shape(before, unit, after)


def _alphabet(pattern: re.Pattern[Any], most: int) -> tuple[list[str], list[str]]:
    """Return the characters that a pattern tells apart, and the words that stand in it."""
    characters: dict[str, None] = dict.fromkeys("a1 ")
    words: list[str] = []
    word = ""

    def end() -> None:
        nonlocal word
        if len(word) > 1 and word not in words:
            words.append(word)
        word = ""

    def walk(node: Any) -> None:
        nonlocal word
        if isinstance(node, tuple) and len(node) == 2 and str(node[0]) == "LITERAL":
            characters[chr(node[1])] = None
            word += chr(node[1])
            return
        if isinstance(node, tuple) and len(node) == 2 and str(node[0]) == "RANGE":
            characters[chr(node[1][0])] = None
            return
        if isinstance(node, (list, tuple, parser.SubPattern)):
            for each in node:
                if not (isinstance(each, tuple) and len(each) == 2 and str(each[0]) == "LITERAL"):
                    end()
                walk(each)
            end()

    text = pattern.pattern if isinstance(pattern.pattern, str) else pattern.pattern.decode("latin-1")
    walk(parser.parse(text, pattern.flags & ~re.UNICODE if isinstance(pattern.pattern, bytes) else pattern.flags))
    characters[_OTHER] = None
    chosen = list(characters)
    # Punctuation first: it is what patterns wait for.
    chosen.sort(key=str.isalnum)
    return chosen[:most], words[:4]


def call_of(found: Found, use: str, text: str) -> Callable[[], object]:
    """Return a call of a pattern on a text."""
    subject: Any = text if isinstance(found.pattern.pattern, str) else text.encode("latin-1", "replace")
    if use in ("sub", "subn"):
        blank = subject[:0]
        return lambda: getattr(found.pattern, use)(blank, subject)
    if use == "finditer":
        return lambda: [*found.pattern.finditer(subject)]
    return lambda: getattr(found.pattern, use)(subject)


def seconds(call: Callable[[], object], times: int = 1) -> float:
    """Return the shortest time of a call."""
    best = float("inf")
    for _ in range(times):
        started = time.process_time()
        call()
        best = min(best, time.process_time() - started)
    return best
