-- The likely cost of an image: prices by model, quality and size, published by the daemons with their models.

create table if not exists image_jobs.prices (
  provider text not null,
  model text not null,
  quality text not null,
  width integer not null,
  height integer not null,
  price numeric,
  primary key (provider, model, quality, width, height),
  constraint prices_of_a_size_an_edge_or_any check (width > 0 and height >= 0 or width = 0 and height = 0)
);
comment on table image_jobs.prices is 'USD for one image where quality or size make a difference; else models.price counts.';
comment on column image_jobs.prices.width is '0: of any size.';
comment on column image_jobs.prices.height is '0: of any size whose longest edge is at most the width.';
comment on column image_jobs.prices.price is 'Null: not known.';

-- Returns the likely cost of one image in USD; null where it is not known. Never fails, whatever it is given.
-- Of the published sizes the one nearest in shape, then in pixels, counts: a provider does not draw every size. Of
-- published edges the shortest that is long enough counts.
create or replace function image_jobs.estimate_cost(p_processor text, p_prompt jsonb)
returns numeric language plpgsql stable security definer set search_path = ''
as $$
declare
  v_provider text := split_part(coalesce(p_processor, ''), ':', 1);
  v_model text := image_jobs.drawing_model(coalesce(p_processor, ''));
  v_name text;
  v_quality text := coalesce(p_prompt ->> 'quality', 'standard');
  v_size text[] := coalesce(
    regexp_match(p_prompt ->> 'size', '^([1-9][0-9]{0,4})x([1-9][0-9]{0,4})$'),
    regexp_match(p_prompt ->> 'aspectRatio', '^([1-9][0-9]{0,3}):([1-9][0-9]{0,3})$'), '{1,1}');
  v_ratio double precision := ln(v_size[1]::double precision / v_size[2]::double precision);
  v_pixels double precision := ln(case when p_prompt ->> 'size' ~ '^[1-9][0-9]{0,4}x[1-9][0-9]{0,4}$'
    then v_size[1]::double precision * v_size[2]::double precision else 1048576 end);
  v_longest integer := case when p_prompt ->> 'size' ~ '^[1-9][0-9]{0,4}x[1-9][0-9]{0,4}$'
    then greatest(v_size[1]::integer, v_size[2]::integer) else 0 end;
  v_price record;
begin
  foreach v_name in array array[
    v_model, case when v_model like '%-____-__-__' then regexp_replace(v_model, '-\d{4}-\d{2}-\d{2}$', '') end]
  loop
    select p.price into v_price from image_jobs.prices p
    where p.provider = v_provider and p.model = v_name and p.quality = v_quality
      and (p.height > 0 or p.width = 0 or p.width >= v_longest)
    order by
      case when p.height > 0 then round(abs(ln(p.width::double precision / p.height) - v_ratio)::numeric, 2) else 0 end,
      case when p.height > 0 then abs(ln(p.width::double precision * p.height) - v_pixels) else p.width end
    limit 1;
    if found then
      return v_price.price;
    end if;
    select m.price into v_price from image_jobs.models m where m.provider = v_provider and m.model = v_name;
    if found then
      return v_price.price;
    end if;
  end loop;
  return null;
end
$$;

create or replace function public.estimate_cost(processor text, prompt_spec jsonb)
returns numeric language sql stable set search_path = ''
as $$
  select image_jobs.estimate_cost(processor, prompt_spec)
$$;
comment on function public.estimate_cost(text, jsonb) is
  'Image Job Orchestrator: the likely cost of one image in USD; null where it is not known.';
