"""Tables, views and functions of the schema `public`, read from the catalogue for each request."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from daemon.database import Connection


@dataclass(frozen=True, slots=True)
class Relation:
    """A table or view; a view has no key."""

    name: str
    columns: Mapping[str, str]
    """The SQL type of each, with its length: a new value is cast to it."""
    types: Mapping[str, str]
    """The SQL type without its length: a value in a filter is cast to it, which must not cut the value."""
    key: Sequence[str]


@dataclass(frozen=True, slots=True)
class Function:
    """A function. `arguments` has the SQL type of each that has a name; those in `optional` have a default."""

    name: str
    arguments: Mapping[str, str]
    optional: frozenset[str]
    unnamed: str | None
    """The type of its only argument, if that has no name."""
    variadic: bool
    returns_set: bool
    returns_row: bool
    columns: Mapping[str, str]
    """The SQL types of a row that it returns, as far as they are declared."""
    returns_nothing: bool


async def relation(connection: Connection, name: str) -> Relation | None:
    """Read the table or view of this name; None if there is none."""
    row = await connection.fetchrow(
        """select c.oid,
          array(select k.attname::text from pg_catalog.pg_index i
            join pg_catalog.pg_attribute k on k.attrelid = c.oid and k.attnum = any (i.indkey)
            where i.indrelid = c.oid and i.indisprimary) as key
        from pg_catalog.pg_class c
        where c.relnamespace = 'public'::regnamespace and c.relname = $1 and c.relkind in ('r', 'p', 'v', 'm', 'f')""",
        name,
    )
    if row is None:
        return None
    columns = await connection.fetch(
        """select a.attname::text as name, pg_catalog.format_type(a.atttypid, a.atttypmod) as exact,
          pg_catalog.format_type(a.atttypid, -1) as loose
        from pg_catalog.pg_attribute a
        where a.attrelid = $1::oid and a.attnum > 0 and not a.attisdropped order by a.attnum""",
        row["oid"],
    )
    return Relation(
        name,
        {each["name"]: each["exact"] for each in columns},
        {each["name"]: each["loose"] for each in columns},
        row["key"],
    )


async def functions(connection: Connection, name: str) -> list[Function]:
    """Read the functions of this name: several if it is overloaded."""
    rows = await connection.fetch(
        """select p.proretset, p.provariadic <> 0 as variadic,
          p.prorettype = 'pg_catalog.void'::regtype as nothing,
          t.typtype::text = 'c' or p.prorettype = 'pg_catalog.record'::regtype as row,
          coalesce(p.proargnames, '{}') as names, p.proargmodes::text[] as modes, p.pronargdefaults as defaults,
          array(select pg_catalog.format_type(a.type, -1)
            from unnest(p.proargtypes) with ordinality as a (type, place) order by a.place) as types,
          array(
            select array[c.name, pg_catalog.format_type(c.type, -1)] from (
              select a.attname::text, a.atttypid from pg_catalog.pg_attribute a
              where a.attrelid = nullif(t.typrelid, 0) and a.attnum > 0 and not a.attisdropped
              union all
              select a.name, a.type from unnest(p.proargnames, p.proallargtypes, p.proargmodes) as a (name, type, mode)
              where a.mode::text in ('o', 'b', 't')
            ) as c (name, type)
          ) as columns
        from pg_catalog.pg_proc p join pg_catalog.pg_type t on t.oid = p.prorettype
        where p.pronamespace = 'public'::regnamespace and p.proname = $1 and p.prokind = 'f'""",
        name,
    )
    found: list[Function] = []
    for row in rows:
        modes = row["modes"] or ["i"] * len(row["types"])
        names = [each for each, mode in zip(row["names"], modes, strict=False) if mode in "ibv"]
        types: list[str] = row["types"]
        names += [""] * (len(types) - len(names))
        optional = names[len(names) - row["defaults"] :] if row["defaults"] else []
        found.append(
            Function(
                name,
                {each: sql_type for each, sql_type in zip(names, types, strict=True) if each},
                frozenset(optional),
                types[0] if names == [""] else None,
                variadic=row["variadic"],
                returns_set=row["proretset"],
                returns_row=row["row"],
                returns_nothing=row["nothing"],
                columns=dict(row["columns"]),
            )
        )
    return found


async def type_name(connection: Connection, name: str) -> str | None:
    """Return the type of this name as safe SQL; None if there is none."""
    # The name is a parameter, never SQL; format_type quotes its result where it must.
    return await connection.fetchval("select pg_catalog.format_type(to_regtype($1), null)", name)
