-- name: every index, column and TOAST table belongs to a relation
-- severity: error
-- needs: each database
-- Rows of the catalog that name each other are written in one transaction: if one is there without the other, that
-- transaction was restored in part.
select 'index ' || i.indexrelid || ' without its table ' || i.indrelid as wrong
from pg_index i
where not exists (select from pg_class c where c.oid = i.indrelid)
   or not exists (select from pg_class c where c.oid = i.indexrelid)
union all
select 'column ' || a.attname || ' without its relation ' || a.attrelid
from pg_attribute a
where not exists (select from pg_class c where c.oid = a.attrelid)
union all
select 'table ' || c.oid || ' without its TOAST table ' || c.reltoastrelid
from pg_class c
where c.reltoastrelid <> 0
  and not exists (select from pg_class t where t.oid = c.reltoastrelid);
