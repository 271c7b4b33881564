-- name: pgcdp.mark
-- needs: each database, by a superuser
-- A named recovery point from inside of Postgres: pgcdp restore --target-name NAME. As part of a transaction it counts
-- when that commits, and where it does; otherwise at once, whatever becomes of the transaction.
create schema if not exists pgcdp;
comment on schema pgcdp is 'continuous data protection';
grant usage on schema pgcdp to public;
create or replace function pgcdp.mark(name text, transactional boolean default false) returns pg_lsn
language plpgsql set search_path = pg_catalog as
$mark$
begin
  if name is null or name = '' or octet_length(name) > 255 then
    raise exception 'a mark has a name of 1 to 255 bytes' using errcode = 'invalid_parameter_value';
  end if;
  return pg_logical_emit_message(transactional, 'pgcdp', name);
end
$mark$;
comment on function pgcdp.mark(text, boolean) is 'a named recovery point: pgcdp restore --target-name';
