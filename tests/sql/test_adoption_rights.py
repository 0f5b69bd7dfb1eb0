"""Adoption: what the migrating user may not do is said before anything is changed; a mixture works on every Postgres."""

from uuid import UUID, uuid4

import pytest

from tests.support.adoption import SPECIFICATION, complete_a_run, differences, lost, migrate, project
from tests.support.dump import dump
from tests.support.postgres import Cluster, connect

pytestmark = pytest.mark.every_postgres

# Of each kind of what works, something.
MIXTURE = (
    "create domain label as text check (value <> '');"
    + SPECIFICATION.replace("VARCHAR", "TEXT").replace("kind TEXT", "kind label").replace("TIMESTAMPTZ", "TIMESTAMP")
    + f"""
    insert into runs (id, kind, subject_id, status) values ('r/1', 'research', '{UUID(int=2)}', 'halfway');
    alter table runs add team text not null default 'a', add number bigint generated always as identity,
        add provider text generated always as (split_part(processor, ':', 1)) stored, add created_at timestamp not null default now(),
        add check (status in ('pending', 'running', 'completed', 'failed', 'cancelled', 'halfway')), enable row level security;
    create unique index on runs (subject_id) where kind = 'research';
    create function touch() returns trigger language plpgsql as $$ begin new.team := upper(new.team); return new; end $$;
    create trigger a_touch before insert or update on runs for each row execute function touch();
    create policy mine on runs using (kind = 'research') with check (kind = 'research');
    create view all_runs as select * from runs;
    """
)


async def test_a_mixture_works_on_every_postgres(postgres: Cluster) -> None:
    async with project(postgres, MIXTURE) as db:
        theirs = await dump(db)
        await migrate(db)
        assert lost(theirs, await dump(db)) == []
        run = await complete_a_run(db, uuid4(), uuid4())
        assert await db.fetchval("select team from runs where id = $1", run) == "A"


@pytest.mark.one_postgres
async def test_tables_of_somebody_else_are_named(postgres: Cluster) -> None:
    async with project(postgres, SPECIFICATION) as db:
        name = await db.fetchval("select current_database()")
        await postgres.sudo("alter table runs owner to supabase_admin", name)
        ((sentence, cure),) = await differences(db)
        assert sentence == "public.runs belongs to supabase_admin, and postgres may not change it."
        await postgres.sudo(cure.removeprefix("Let its owner run: "), name)
        await migrate(db)


@pytest.mark.one_postgres
@pytest.mark.usefixtures("database")  # makes the cluster's roles
@pytest.mark.parametrize("prefix", ["plain_", "My-User-"])
async def test_a_user_without_rights_is_told_which_are_missing(postgres: Cluster, prefix: str) -> None:
    role, name = f"{prefix}{uuid4().hex[:8]}", f"plain_{uuid4().hex[:8]}"
    await postgres.sudo(f'create role "{role}" login; grant anon, authenticated, service_role to "{role}"')
    await postgres.sudo(f"create database {name} template template0")
    try:
        db = await connect(postgres.server.dsn(name, user=role))
        found = await differences(db)
        assert [sentence for sentence, _ in found] == [
            f"The user {role} may not make a schema in this database.",
            f"The user {role} may not make tables in the schema public.",
        ]
        for _, cure in found:
            await postgres.sudo(cure.removeprefix("Let its owner run: "), name)
        await db.execute(SPECIFICATION + "alter table runs enable row level security, force row level security")
        ((sentence, cure),) = await differences(db)
        assert sentence == f"public.runs forces row level security on its owner, and {role} cannot bypass it."
        await db.execute(cure.removeprefix("Run: "))
        await migrate(db)
        await db.close()
    finally:
        await postgres.sudo(f"drop database {name} with (force)")
        await postgres.sudo(f'drop role "{role}"')
