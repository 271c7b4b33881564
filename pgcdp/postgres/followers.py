"""Who cannot follow a cluster that goes back: standbys, subscribers, slots, subscriptions, each with what to do.

A standby has replayed WAL that the new timeline does not have; a logical slot has passed on changes that never were; a
subscription has taken changes from elsewhere that its publisher will not send again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pgcdp.postgres.session import query

if TYPE_CHECKING:
    from pgcdp.postgres.session import Connection

_STANDBYS = """
select distinct r.application_name, coalesce(r.client_addr::text, 'on this machine'), coalesce(s.slot_type, 'physical')
from pg_stat_replication r left join pg_replication_slots s on s.active_pid = r.pid order by 1
"""
_KINDS = {"physical": "standby", "logical": "subscriber"}
_SLOTS = (
    "select slot_name::text, slot_type, coalesce(database::text, ''), plugin::text from pg_replication_slots order by 1"
)
_SUBSCRIPTIONS = """
select d.datname::text, s.subname::text from pg_subscription s join pg_database d on d.oid = s.subdbid order by 1, 2
"""

_DROP = "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = '{}';"
"""At the point that was gone back to, it may not have been made yet."""


def followers(connection: Connection) -> list[dict[str, Any]]:
    """All of them: {"kind", "name", "where", "command"}."""
    found = []
    for name, where, kind in query(connection, _STANDBYS).rows or []:
        command = "stop it, then pg_rewind --source-server=... or pg_basebackup -R, and start it"
        if kind == "logical":
            command = "empty its tables there, drop its subscription and create it anew, once the slot is made anew"
        found.append({"kind": _KINDS[kind], "name": name, "where": where, "command": command})
    for name, kind, database, plugin in query(connection, _SLOTS).rows or []:
        if kind == "logical":
            command = (
                f"in {database}: {_DROP.format(name)} SELECT pg_create_logical_replication_slot('{name}', '{plugin}'); "
                "and copy its tables to the subscriber again"
            )
        else:
            command = f"{_DROP.format(name)} SELECT pg_create_physical_replication_slot('{name}', true);"
        found.append({"kind": f"{kind} slot", "name": name, "where": database, "command": command})
    for database, name in query(connection, _SUBSCRIPTIONS).rows or []:
        command = f"in {database}: ALTER SUBSCRIPTION {name} DISABLE, empty its tables, drop it and create it anew"
        found.append({"kind": "subscription", "name": name, "where": database, "command": command})
    return found
