"""A parser for PostgREST's query parameters: columns, filters, ordering."""

import re
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from daemon.dev.supabase.rest.errors import RestError, bad_query, not_implemented

OPERATORS = {
    "eq": "=",
    "neq": "<>",
    "gt": ">",
    "gte": ">=",
    "lt": "<",
    "lte": "<=",
    "like": "like",
    "ilike": "ilike",
    "match": "~",
    "imatch": "~*",
    "isdistinct": "is distinct from",
    "cs": "@>",
    "cd": "<@",
    "ov": "&&",
    "in": "= any",
    "is": "is",
}
STATES = {"null": "null", "not_null": "not null", "true": "true", "false": "false", "unknown": "unknown"}
"""Operands of `is`."""

MOST_BRACKETS = 200
"""In one logic tree: deeper ones would exhaust the stack."""

_NOT_IMPLEMENTED = frozenset({"fts", "plfts", "phfts", "wfts", "sl", "sr", "nxr", "nxl", "adj"})
_NAME = re.compile(r'"((?:[^"\\]|\\.)*)"|((?:[^\s".,()*:>-]|-(?!>)|[ ](?=\S))+)')
_ARROW = re.compile(r"(->>?)(?:\"((?:[^\"\\]|\\.)*)\"|((?:[^\s\".,():>-]|-(?!>))+))")
_CAST = re.compile(r"::([A-Za-z_][A-Za-z0-9_ ]*(?:\[\])?)")
_OPERATOR = re.compile(r"([a-z]+)(\((?:any|all)\))?\.")
_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"')
_PLAIN = re.compile(r'[^,()"]*')


@dataclass(frozen=True, slots=True)
class Field:
    """A column, or a value inside of it, by a path of arrows."""

    name: str
    path: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Selected:
    """One of the columns to return; without a field, all of them."""

    field: Field | None
    alias: str | None = None
    cast: str | None = None


@dataclass(frozen=True, slots=True)
class Condition:
    """A comparison. `value` is a list for `in`."""

    field: Field
    operator: str
    value: str | list[str]
    negated: bool = False


@dataclass(frozen=True, slots=True)
class Group:
    """Conditions of which all, or one, must hold."""

    kind: Literal["and", "or"]
    members: "list[Filter]" = field(default_factory=list["Filter"])
    negated: bool = False


Filter: TypeAlias = Condition | Group


@dataclass(frozen=True, slots=True)
class Ordering:
    """A term of the ordering. `direction` and `nulls` are SQL, or empty."""

    field: Field
    direction: str = ""
    nulls: str = ""


class Reader:
    """Parses the value of one query parameter, from left to right.

    Args:
        text: The value.
        what: The name of the parameter, for error messages.
    """

    def __init__(self, text: str, what: str) -> None:
        self._text = text
        self._what = what
        self._at = 0

    def selected(self) -> list[Selected]:
        """Parse the value of `select`."""
        found = [self._selected()]
        while self._take(","):
            found.append(self._selected())
        self._end()
        return found

    def names(self) -> list[str]:
        """Parse the value of `columns` or `on_conflict`."""
        found = [self._name()]
        while self._take(","):
            found.append(self._name())
        self._end()
        return found

    def ordering(self) -> list[Ordering]:
        """Parse the value of `order`."""
        found = [self._ordering()]
        while self._take(","):
            found.append(self._ordering())
        self._end()
        return found

    def key(self) -> Field:
        """Parse the name of a filter."""
        found = self._field()
        if self._text.startswith(".", self._at):
            raise not_implemented("filters on embedded resources")
        self._end()
        return found

    def condition(self, of: Field) -> Condition:
        """Parse the value of a filter, to the end: commas and brackets have no meaning here."""
        negated = self._take("not.")
        operator = self._operator()
        if operator == "in":
            value: str | list[str] = self._list()
            self._end()
        else:
            value, self._at = self._text[self._at :], len(self._text)
        return self._checked(Condition(of, operator, value, negated))

    def group(self, kind: Literal["and", "or"], *, negated: bool) -> Group:
        """Parse the value of `and` or `or`."""
        if self._text.count("(") > MOST_BRACKETS:
            raise bad_query(self._what, self._text[:40], "too many brackets")
        found = self._group(kind, negated=negated)
        self._end()
        return found

    def _selected(self) -> Selected:
        if self._take("*"):
            return Selected(None)
        start = self._at
        first = self._name()
        alias = None
        if self._text.startswith(":", self._at) and not self._text.startswith("::", self._at):
            self._at += 1
            alias = first
        else:
            self._at = start
        of = self._field()
        if self._text.startswith("(", self._at) or self._text.startswith("!", self._at):
            raise not_implemented("embedded resources and aggregates in select")
        if self._text.startswith(".", self._at):
            raise not_implemented("aggregates in select")
        cast = _CAST.match(self._text, self._at)
        if cast:
            self._at = cast.end()
        return Selected(of, alias, cast[1] if cast else None)

    def _ordering(self) -> Ordering:
        of = self._field()
        direction = nulls = ""
        if self._take(".asc"):
            direction = "asc"
        elif self._take(".desc"):
            direction = "desc"
        if self._take(".nullsfirst"):
            nulls = "nulls first"
        elif self._take(".nullslast"):
            nulls = "nulls last"
        return Ordering(of, direction, nulls)

    def _group(self, kind: Literal["and", "or"], *, negated: bool) -> Group:
        self._expect("(")
        members = [self._member()]
        while self._take(","):
            members.append(self._member())
        self._expect(")")
        return Group(kind, members, negated)

    def _member(self) -> Filter:
        start = self._at
        negated = self._take("not.")
        kinds: tuple[Literal["and", "or"], ...] = ("and", "or")
        for kind in kinds:
            if self._text.startswith(f"{kind}(", self._at):
                self._at += len(kind)
                return self._group(kind, negated=negated)
        self._at = start  # a column may be called "not"
        of = self._field()
        self._expect(".")
        negated = self._take("not.")
        operator = self._operator()
        value = self._list() if operator == "in" else self._value()
        return self._checked(Condition(of, operator, value, negated))

    def _field(self) -> Field:
        name = self._name()
        path: list[tuple[str, str]] = []
        while arrow := _ARROW.match(self._text, self._at):
            self._at = arrow.end()
            path.append((arrow[1], _unescaped(arrow[2]) if arrow[2] is not None else arrow[3]))
        return Field(name, tuple(path))

    def _name(self) -> str:
        found = _NAME.match(self._text, self._at)
        if not found:
            raise self._error("field name")
        self._at = found.end()
        return _unescaped(found[1]) if found[1] is not None else found[2]

    def _operator(self) -> str:
        found = _OPERATOR.match(self._text, self._at)
        if not found or (found[1] not in OPERATORS and found[1] not in _NOT_IMPLEMENTED):
            raise self._error('"not" or operator (eq, gt, …)')
        if found[2] or found[1] in _NOT_IMPLEMENTED:
            raise not_implemented(f"the operator {found[0].rstrip('.')}")
        self._at = found.end()
        return found[1]

    def _list(self) -> list[str]:
        self._expect("(")
        if self._take(")"):
            return []
        found = [self._value()]
        while self._take(","):
            found.append(self._value())
        self._expect(")")
        return found

    def _value(self) -> str:
        """Parse a value in quotes, or up to the next comma or bracket; braces keep their commas."""
        if quoted := _QUOTED.match(self._text, self._at):
            self._at = quoted.end()
            return _unescaped(quoted[1])
        if self._text.startswith("{", self._at) and (end := self._text.find("}", self._at)) > 0:
            start, self._at = self._at, end + 1
            return self._text[start : self._at]
        plain = _PLAIN.match(self._text, self._at)
        assert plain is not None
        self._at = plain.end()
        return plain[0]

    def _checked(self, condition: Condition) -> Condition:
        if condition.operator == "is" and str(condition.value).lower() not in STATES:
            raise self._error("null or trilean value (unknown, true, false)")
        return condition

    def _take(self, text: str) -> bool:
        if not self._text.startswith(text, self._at):
            return False
        self._at += len(text)
        return True

    def _expect(self, text: str) -> None:
        if not self._take(text):
            raise self._error(f'"{text}"')

    def _end(self) -> None:
        if self._at < len(self._text):
            raise self._error("end of input")

    def _error(self, expected: str) -> RestError:
        rest = self._text[self._at : self._at + 1]
        seen = f'unexpected "{rest}"' if rest else "unexpected end of input"
        return bad_query(self._what, self._text, f"{seen} expecting {expected}")


def _unescaped(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text)
