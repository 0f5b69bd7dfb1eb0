"""SQL from a parsed request: every name is quoted, every value is a parameter (S608 does not see that).

Values are passed as text and cast to the type of their column in the database.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from daemon.dev.supabase.rest.catalogue import Function, Relation
from daemon.dev.supabase.rest.grammar import OPERATORS, STATES, Condition, Field, Filter, Group, Ordering, Selected

CALLED = "pgrst_called"
"""The name of a function's rows in the statement."""

UPDATED = "pgrst.updated"
"""A setting of the transaction: the number of rows that an upsert has updated."""

_AS_TEXT = frozenset({"like", "ilike", "match", "imatch"})


def quoted(name: str) -> str:
    """Quote a name as an SQL identifier."""
    return '"' + name.replace("\0", "").replace('"', '""') + '"'


class Statement:
    """Builds one statement, and collects its parameters.

    Args:
        source: The table, or `CALLED`, that columns belong to.
        types: The SQL type of each column of it that is known.
    """

    def __init__(self, source: str, types: Mapping[str, str]) -> None:
        self.parameters: list[Any] = []
        self._source = quoted(source)
        self._types = types

    def parameter(self, value: Any, sql_type: str) -> str:
        """Add a parameter, a text or a list of texts. Return its placeholder, cast to `sql_type`."""
        self.parameters.append(value)
        return f"(${len(self.parameters)}::{'text[]' if isinstance(value, list) else 'text'})::{sql_type}"

    def columns(self, selected: Sequence[Selected]) -> str:
        """Return the list for `select` or `returning`. Types of casts must come from `type_name`."""
        return ", ".join(self._column(each) for each in selected)

    def where(self, filters: Sequence[Filter]) -> str:
        """Return the `where` clause; empty without filters."""
        return f" where {' and '.join(self._filter(each) for each in filters)}" if filters else ""

    def ordering(self, ordering: Sequence[Ordering]) -> str:
        """Return the `order by` clause; empty without terms."""
        terms = (f"{self._expression(each.field)} {each.direction} {each.nulls}".rstrip() for each in ordering)
        return f" order by {', '.join(terms)}" if ordering else ""

    def page(self, offset: int, limit: int | None) -> str:
        place = f" offset {self.parameter(str(offset), 'bigint')}" if offset else ""
        return place if limit is None else f" limit {self.parameter(str(limit), 'bigint')}{place}"

    def _column(self, selected: Selected) -> str:
        of = selected.field
        if of is None:
            return f"{self._source}.*"
        expression = self._expression(of)
        if selected.cast:
            expression = f"cast({expression} as {selected.cast})"
        keys = [key for _, key in of.path if not _is_index(key)]
        alias = selected.alias or (keys[-1] if keys else of.name)
        return f"{expression} as {quoted(alias)}"

    def _expression(self, of: Field) -> str:
        column = f"{self._source}.{quoted(of.name)}"
        if of.path and self._types.get(of.name) != "jsonb":
            column = f"to_jsonb({column})"
        for arrow, key in of.path:
            column += f" {arrow} {self.parameter(key, 'integer' if _is_index(key) else 'text')}"
        return f"({column})" if of.path else column

    def _filter(self, one: Filter) -> str:
        if isinstance(one, Group):
            text = "(" + f" {one.kind} ".join(self._filter(each) for each in one.members) + ")"
        else:
            text = self._condition(one)
        return f"not ({text})" if one.negated else text

    def _condition(self, one: Condition) -> str:
        left, operator = self._expression(one.field), OPERATORS[one.operator]
        if isinstance(one.value, list):
            return f"{left} {operator} ({self.parameter(one.value, f'{self._type(one.field)}[]')})"
        if one.operator == "is":
            return f"{left} is {STATES[one.value.lower()]}"
        if one.operator in _AS_TEXT:
            pattern = one.value.replace("*", "%") if operator.endswith("like") else one.value
            return f"{left} {operator} {self.parameter(pattern, 'text')}"
        return f"{left} {operator} {self.parameter(one.value, self._type(one.field))}"

    def _type(self, of: Field) -> str:
        if of.path:
            return "text" if of.path[-1][0] == "->>" else "jsonb"
        return self._types.get(of.name, "text")  # the database reports that there is no such column


def counted(
    inner: str,
    *,
    before: str = "",
    total: str = "null",
    single: bool,
    scalar: bool = False,
    strip_nulls: bool = False,
) -> str:
    """Wrap a query into a statement that returns one row: number of rows, number without the limit, JSON.

    Args:
        inner: The query.
        before: CTEs that `inner` and `total` use: `name as (…), `.
        total: An SQL expression.
        single: The JSON is that of the first row, not of a list.
        scalar: Rows have one column, `pgrst_scalar`, and are its value.
        strip_nulls: Leave keys out whose values are null.
    """
    row = "pgrst_row.pgrst_scalar" if scalar else "pgrst_row"
    rows = f"json_agg({row})"
    if strip_nulls:
        rows = f"json_strip_nulls({rows})"
    body = f"coalesce({rows} -> 0, 'null')" if single else f"coalesce({rows}, '[]')"
    return (
        f"with {before}pgrst_source as ({inner}) select count(*) as rows, ({total})::bigint as total, "  # noqa: S608
        f"({body})::text as body, nullif(current_setting('{UPDATED}', true), '')::bigint as updated "
        "from (select * from pgrst_source) as pgrst_row"
    )


def insert(
    statement: Statement,
    table: Relation,
    body: str,
    columns: Sequence[str],
    *,
    conflict: Sequence[str],
    merge: bool,
    returning: str,
) -> str:
    """Insert the objects of a JSON array.

    Args:
        statement: Collects the parameters.
        table: The target.
        body: The array.
        columns: Keys to insert.
        conflict: Columns of `on conflict`; without any, a duplicate is an error.
        merge: Update a row that is there; else it is left as it is.
        returning: The `returning` list.
    """
    names = ", ".join(map(quoted, columns))
    rows = statement.parameter(body, "json")
    if columns:
        body_rows = f"json_to_recordset({rows}) as pgrst_body ({_typed(table, columns)})"
        source = f"({names}) select {names} from {body_rows}"  # noqa: S608
    else:  # empty objects: a row of defaults each, of which an insert without names makes no more than it is given
        source = f"select from json_array_elements({rows})"
    action = ""
    if conflict:
        changes = ", ".join(f"{quoted(name)} = excluded.{quoted(name)}" for name in columns)
        action = f" on conflict ({', '.join(map(quoted, conflict))}) do "
        action += f"update set {changes} where {_COUNT_UPDATED} is not null" if merge and changes else "nothing"
    return f"insert into public.{quoted(table.name)} {source}{action} returning {returning}"


def update(
    statement: Statement, table: Relation, body: str, columns: Sequence[str], *, where: str, returning: str
) -> str:
    """Update rows to the values of a JSON object; `where` must not be empty."""
    changes = ", ".join(f"{quoted(name)} = pgrst_body.{quoted(name)}" for name in columns)
    values = f"json_to_record({statement.parameter(body, 'json')}) as pgrst_body ({_typed(table, columns)})"
    return f"update public.{quoted(table.name)} set {changes} from {values}{where} returning {returning}"  # noqa: S608


def call(statement: Statement, function: Function, arguments: str | Mapping[str, str], names: Sequence[str]) -> str:
    """Call a function.

    Args:
        statement: Collects the parameters.
        function: The function.
        arguments: A JSON object, or the texts of a query string.
        names: The arguments to pass.
    """
    source = ""
    if isinstance(arguments, str):
        given = [f"{quoted(each)} := pgrst_body.{quoted(each)}" for each in names]
        if names:
            typed = ", ".join(f"{quoted(each)} {function.arguments[each]}" for each in names)
            source = f"json_to_record({statement.parameter(arguments, 'json')}) as pgrst_body ({typed})"
    else:
        types = function.arguments
        given = [f"{quoted(each)} := {statement.parameter(arguments[each], types[each])}" for each in names]
    return _called(function, ", ".join(given), source)


def call_with_body(statement: Statement, function: Function, body: str) -> str:
    """Call a function whose only argument has no name, with the body byte for byte."""
    assert function.unnamed is not None
    return _called(function, statement.parameter(body, function.unnamed), "")


_COUNT_UPDATED = (
    f"set_config('{UPDATED}', (coalesce(nullif(current_setting('{UPDATED}', true), ''), '0')::bigint + 1)::text, true)"
)


def _called(function: Function, arguments: str, source: str) -> str:
    invocation = f"public.{quoted(function.name)}({arguments})"
    if function.returns_row:
        source = f"{source}, lateral " if source else ""
        return f"select pgrst_call.* from {source}{invocation} as pgrst_call"  # noqa: S608
    return f"select {invocation} as pgrst_scalar{f' from {source}' if source else ''}"  # noqa: S608


def _typed(table: Relation, columns: Sequence[str]) -> str:
    return ", ".join(f"{quoted(name)} {table.columns[name]}" for name in columns)


def _is_index(key: str) -> bool:
    return key.removeprefix("-").isdecimal()
