-- name: no prepared transaction is pending
-- severity: warning
-- Recovery brings back what PREPARE TRANSACTION left; somebody has to commit it or roll it back.
select gid, database, prepared from pg_prepared_xacts;
