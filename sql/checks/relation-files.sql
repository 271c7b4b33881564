-- name: every relation has its file
-- severity: error
-- needs: each database
-- A relation whose first segment is gone was lost by the filesystem or by a restore.
-- Postgres itself would only notice when something reads it.
select c.oid::regclass::text as relation, pg_relation_filepath(c.oid) as file
from pg_class c
where c.relkind in ('r', 'i', 't', 'm', 'S')
  and c.relpersistence <> 't'
  and pg_relation_filepath(c.oid) is not null
  and pg_stat_file(pg_relation_filepath(c.oid), true) is null;
