"""migrate: what is in the way of a migration is printed, each with its cure."""

from tests.support.adoption import SPECIFICATION
from tests.support.postgres import connect

PRINTED = """\
image-jobs: 3 things in this database are in the way of the Image Job Orchestrator.
- public.workflow_members has the name of something that the Image Job Orchestrator makes.
  Rename it: alter table public.workflow_members rename to …;
- public.run_events.payload is of type json, and has to be jsonb.
  Run: alter table public.run_events alter column payload type jsonb using payload::jsonb; (and alike for what refers to it). \
Or rename the table (alter table public.run_events rename to …): another is made then.
- public.runs.payload is of type json, and has to be jsonb.
  Run: alter table public.runs alter column payload type jsonb using payload::jsonb; (and alike for what refers to it). \
Or rename the table (alter table public.runs rename to …): another is made then.
Nothing was changed. Do what the lines above say, then migrate again.
"""


async def test_migrate_prints_every_difference_with_its_cure(image_jobs, postgres):
    async with postgres.database(template=None) as dsn:
        db = await connect(dsn)
        await db.execute(
            SPECIFICATION.replace("payload JSONB", "payload JSON") + "create table workflow_members (id int);"
        )
        await db.close()
        done = await image_jobs("migrate", DATABASE_URL=dsn)
    assert (done.code, done.err) == (1, PRINTED)
