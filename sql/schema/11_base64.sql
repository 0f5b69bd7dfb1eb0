-- Never base64 in the database: the rule behind every check constraint whose name contains `base64`.

-- Returns true if a column's value holds an embedded file. That is:
--   any `data:…;base64,` in any case; or
--   more than 1,024 characters in total of tokens of at least 60 characters in either base64 alphabet, keys included,
--   where http(s) URLs of up to 2,048 characters are not counted.
-- Works on the text of the value with its escape sequences blanked, which is every key and every string in one piece.
create or replace function image_jobs.has_base64(p_value jsonb)
returns boolean language plpgsql immutable parallel safe set search_path = ''
as $$
declare
  v_text text := p_value::text;
  v_total bigint;
begin
  -- All that most values cost.
  if v_text is null or length(v_text) <= 1024 and v_text not like '%64,%' then
    return false;
  end if;
  if v_text ~* 'data:[^,]*;base64,' then
    -- Within one string: a key and its value do not make a file between them.
    v_text := regexp_replace(v_text, '\\(u[0-9a-f]{4}|.)', ' ', 'g');
    if v_text ~* 'data:[^,"]*;base64,' then
      return true;
    end if;
  end if;
  -- The second condition costs a twentieth of what follows: 1 MiB of short URLs took 0.4 s.
  if length(v_text) <= 1024 or v_text !~ '[A-Za-z0-9+/_-]{60}' then
    return false;
  end if;
  -- chr(1) cannot stand in the text of a jsonb value, so it can fence the URLs: every second piece is one.
  -- (Blanks are the only white space left in it. \s would ask the collation about others.)
  v_text := regexp_replace(v_text, '\\(u[0-9a-f]{4}|.)', ' ', 'g');
  v_text := regexp_replace(v_text, 'https?://[^ "<>]+', chr(1) || '\&' || chr(1), 'gi');
  select coalesce(sum(length(token[1])), 0) into v_total
  from string_to_table(v_text, chr(1)) with ordinality as piece (content, place)
  cross join lateral regexp_matches(piece.content, '([A-Za-z0-9+/]{60,}={0,2}|[A-Za-z0-9_-]{60,}={0,2})', 'g') as token
  where piece.place % 2 = 1 or length(piece.content) > 2048;
  return v_total > 1024;
end
$$;
comment on function image_jobs.has_base64(jsonb) is 'Whether a jsonb value embeds a file as base64.';
