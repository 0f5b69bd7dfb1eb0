-- image_models says which qualities a model has.

set local lock_timeout = '5s';
set local statement_timeout = '10min';

alter table private.models add column if not exists qualities text[] not null default '{}';
comment on column private.models.qualities is 'What promptSpec.quality may be and make a difference; empty: there is one quality.';

-- A computed column of image_models, `select=*,qualities`: with one more column of its own the view could not be replaced by
-- the migration that made it, and migrations may run twice.
create or replace function public.qualities(model public.image_models)
returns text[] language sql stable set search_path = ''
as $$
  select m.qualities from private.models m where (m.provider, m.model) = (model.provider, model.model)
$$;
comment on function public.qualities(public.image_models) is 'What promptSpec.quality may be and make a difference.';
revoke all on function public.qualities(public.image_models) from public, anon, authenticated, service_role;
grant execute on function public.qualities(public.image_models) to anon, authenticated, service_role;

-- Publishes what a provider has on offer: the rows of image_models are replaced by these. A daemon from before there were
-- qualities does not name any.
create or replace function private.publish_models(p_provider text, p_models jsonb)
returns void language plpgsql volatile set search_path = ''
as $$
begin
  delete from private.models m
  where m.provider = p_provider and not exists (
    select from jsonb_to_recordset(p_models) as n (model text) where n.model = m.model);
  insert into private.models
  select n.* from jsonb_populate_recordset(
    jsonb_populate_record(null::private.models, '{"qualities": []}'), p_models) n
  order by n.provider, n.model
  on conflict (provider, model) do update set
    sizes = excluded.sizes, ratios = excluded.ratios, seed = excluded.seed, negative_prompt = excluded.negative_prompt,
    previous_image = excluded.previous_image, previews = excluded.previews, price = excluded.price,
    typical_seconds = excluded.typical_seconds, retired = excluded.retired, successor = excluded.successor,
    as_of = excluded.as_of, source = excluded.source, qualities = excluded.qualities;
end
$$;
