-- name: the role pgcdp
-- needs: once in a cluster, by a superuser
-- What the agent needs of Postgres, and nothing more: run checkpoints (a role for that exists from 15 on; before, only
-- superusers can), read settings that are hidden from others, and see statistics. It owns nothing and reads no table.
do $role$
begin
  if not exists (select from pg_roles where rolname = 'pgcdp') then
    create role pgcdp login nosuperuser nocreatedb nocreaterole noreplication nobypassrls;
    comment on role pgcdp is 'continuous data protection: checkpoints, settings, statistics';
  end if;
  if current_setting('server_version_num')::int >= 160000 then  -- from then on each membership says so for itself
    execute 'grant pg_read_all_settings, pg_read_all_stats, pg_checkpoint to pgcdp with inherit true';
  else
    alter role pgcdp inherit;
    grant pg_read_all_settings, pg_read_all_stats to pgcdp;
    if current_setting('server_version_num')::int >= 150000 then
      grant pg_checkpoint to pgcdp;
    end if;
  end if;
end
$role$;
grant execute on function pg_control_checkpoint() to pgcdp;
