-- The parts that a project around us has to have: buckets, policies of Storage and Realtime, a table in a publication. Both make their
-- tables in their own time, perhaps after us. So this runs at every `image-jobs migrate` and as each migration's last line.

create table image_jobs.project (
  single boolean primary key default true check (single),
  bucket text not null,
  private boolean not null default false,
  own_buckets text[] not null default '{}'
);
comment on table image_jobs.project is 'One row: what migrate was last told of this project.';
comment on column image_jobs.project.own_buckets is 'Buckets that were made by us, so that all that lies in them is ours.';

-- Returns each thing that is wanted around us: `state` is `there`; `missing`; `later`, where a service has not made what it
-- goes into; or `absent`, where nothing is to be done. `note` says why or what follows, `command` is the SQL that makes it.
create or replace function image_jobs.check_set_up(p_bucket text, p_private boolean default false)
returns table (step text, state text, note text, command text) language sql stable set search_path = ''
as $$
  select * from image_jobs.storage_steps(p_bucket, p_private)
  union all
  select * from image_jobs.realtime_steps()
$$;

-- Make what is missing, and return it all as check_set_up does: `state` may also be `made`, or `refused`, with the reason as
-- `note`, which is a warning, too. Without a bucket, or whether it is to be private: as the last time.
create or replace function image_jobs.set_up(p_bucket text default null, p_private boolean default null)
returns table (step text, state text, note text, command text) language plpgsql volatile
  set search_path = '' set lock_timeout = '5s' set client_min_messages = 'warning'
as $$
declare
  v_bucket constant text := coalesce(p_bucket, (select p.bucket from image_jobs.project p), 'images');
  v_private constant boolean := coalesce(p_private, (select p.private from image_jobs.project p), false);
begin
  -- Of two at once the second finds all of it there.
  perform pg_advisory_xact_lock(hashtextextended('image_jobs.set_up', 0));
  insert into image_jobs.project as p (bucket, private) values (v_bucket, v_private)
  on conflict (single) do update set bucket = excluded.bucket, private = excluded.private
    where (p.bucket, p.private) <> (excluded.bucket, excluded.private);
  for step, state, note, command in select c.* from image_jobs.check_set_up(v_bucket, v_private) c loop
    if state = 'missing' then
      begin
        execute command;
        state := 'made';
      exception when others then
        state := 'refused';
        note := sqlerrm;
      end;
    end if;
    if state in ('refused', 'later') then
      raise warning using message = format('%s could not be made: %s.', upper(left(step, 1)) || substr(step, 2), note),
        hint = 'Run image-jobs migrate later, or as a role that may: ' || command;
    end if;
    return next;
  end loop;
end
$$;

select image_jobs.set_up();
