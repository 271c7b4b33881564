-- name: no index is invalid
-- severity: warning
-- needs: each database
-- What CREATE INDEX CONCURRENTLY leaves when it fails, or when the recovery point lies inside of it.
select indexrelid::regclass::text as index, indrelid::regclass::text as of_table
from pg_index
where not indisvalid;
