"""What Postgres in a sandbox is told: a pure function from an interval's settings and pg_control to a configuration.

Taken over from production are the limits that recovery compares or needs (`KEPT`), and what a session may set for
itself, on which answers and plans depend (`session_settings`). Everything that names a path, a peer, a program or a
library, or that takes memory at its start, is overridden on the command line, which beats every file.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from ipaddress import IPv4Address
from typing import Any

from pgcdp.postgres.control import Control

KEPT = (
    "max_connections",
    "max_prepared_transactions",
    "max_worker_processes",
    "max_wal_senders",
    "max_locks_per_transaction",
    "max_replication_slots",
    "max_active_replication_origins",
    "wal_level",
    "track_commit_timestamp",
    "wal_log_hints",
)
"""Limits that a sandbox takes over."""

_FOR_ALL = frozenset(("configuration file", "command line", "environment variable"))
"""Sources of settings that hold for all sessions of production. Those of roles and databases are in the image."""
_ALSO = frozenset(("session_replication_role", "lo_compat_privileges"))
"""What only a superuser may set, and answers depend on."""
_NOT_OF_SESSIONS_HERE = frozenset(
    (
        "application_name",  # of each client
        "client_encoding",
        "exit_on_error",  # the first statement that fails would end a check
        "backend_flush_after",  # for production's disks
        "commit_siblings",
        "wal_sender_timeout",
        "maintenance_work_mem",
    )
)
_NOT_OF_SESSIONS_PREFIXES = ("debug_", "log_", "tcp_", "trace_", "client_connection_")
_IN_A_FILE = re.compile(r"[A-Za-z_\x80-\uffff][\w$]*(\.[A-Za-z_\x80-\uffff][\w$]*)?")
"""Names that guc-file.l reads (ID and QUALIFIED_ID); a command line takes others too."""

_WAL_LEVELS = ("minimal", "replica", "logical")
_SINCE = {"max_active_replication_origins": 18}
# Names of the limits in pg_control. It is newer than the interval's settings when they changed inside the interval.
_CONTROL_LIMITS = (
    "max_connections",
    "max_prepared_transactions",
    "max_worker_processes",
    "max_wal_senders",
    "max_locks_per_transaction",
)

# (name, value, first version, last version)
_OVERRIDES: tuple[tuple[str, str, int, int], ...] = (
    # reached by nobody but the owner of the socket's directory
    ("listen_addresses", "", 13, 99),
    ("unix_socket_permissions", "0700", 13, 99),
    ("ssl", "off", 13, 99),
    ("bonjour", "off", 13, 99),
    ("external_pid_file", "", 13, 99),
    ("cluster_name", "pgcdp sandbox", 13, 99),
    # archives, restores, streams and subscribes nothing
    ("archive_mode", "off", 13, 99),
    ("archive_command", "", 13, 99),
    ("archive_library", "", 15, 99),
    ("archive_cleanup_command", "", 13, 99),
    ("restore_command", "", 13, 99),
    ("recovery_end_command", "", 13, 99),
    ("primary_conninfo", "", 13, 99),
    ("primary_slot_name", "", 13, 99),
    ("promote_trigger_file", "", 13, 15),
    ("recovery_target", "", 13, 99),
    ("recovery_target_lsn", "", 13, 99),
    ("recovery_target_name", "", 13, 99),
    ("recovery_target_time", "", 13, 99),
    ("recovery_target_xid", "", 13, 99),
    ("synchronous_standby_names", "", 13, 99),
    ("synchronized_standby_slots", "", 17, 99),
    ("sync_replication_slots", "off", 17, 99),
    ("summarize_wal", "off", 17, 99),
    ("max_logical_replication_workers", "0", 13, 99),
    # runs nothing but itself (pg_cron and its like come with preloading)
    ("shared_preload_libraries", "", 13, 99),
    ("session_preload_libraries", "", 13, 99),
    ("local_preload_libraries", "", 13, 99),
    ("dynamic_library_path", "$libdir", 13, 99),
    ("jit", "off", 13, 99),  # of its results nothing depends on it, and it takes memory
    ("autovacuum", "off", 13, 99),
    ("superuser_reserved_connections", "0", 13, 99),
    ("reserved_connections", "0", 16, 99),
    ("event_triggers", "off", 17, 99),
    ("restart_after_crash", "off", 13, 99),
    # takes little of the machine, and need not survive it
    ("shared_buffers", "128MB", 13, 99),
    ("huge_pages", "off", 13, 99),
    ("maintenance_work_mem", "256MB", 13, 99),
    ("max_slot_wal_keep_size", "64MB", 13, 99),  # nobody comes to fetch what the image's slots keep
    ("temp_tablespaces", "", 13, 99),
    ("stats_temp_directory", "pg_stat_tmp", 13, 14),
    ("fsync", "off", 13, 99),
    ("synchronous_commit", "off", 13, 99),
    # accepts writes, and gives every check its time
    ("default_transaction_read_only", "off", 13, 99),
    ("idle_session_timeout", "0", 14, 99),
    ("transaction_timeout", "0", 17, 99),
    # tells what it finds, here and in words that can be read, and hides no damage
    ("log_destination", "stderr", 13, 99),
    ("logging_collector", "off", 13, 99),
    ("log_min_messages", "warning", 13, 99),
    ("log_min_error_statement", "panic", 13, 99),
    ("log_statement", "none", 13, 99),
    ("log_line_prefix", "%m [%p] ", 13, 99),
    ("log_timezone", "UTC", 13, 99),
    ("log_checkpoints", "off", 13, 99),
    ("lc_messages", "C", 13, 99),
    ("ignore_checksum_failure", "off", 13, 99),
    ("zero_damaged_pages", "off", 13, 99),
    ("ignore_invalid_pages", "off", 13, 99),
    ("ignore_system_indexes", "off", 13, 99),
)

_SESSION_OPTIONS = (
    "statement_timeout=0",
    "lock_timeout=0",
    "idle_in_transaction_session_timeout=0",
    "default_transaction_read_only=off",
    "default_transaction_isolation=read\\ committed",
    "datestyle=ISO",
    "intervalstyle=postgres",
    "bytea_output=hex",
    "extra_float_digits=1",
    "standard_conforming_strings=on",
    "default_tablespace=",
    "session_replication_role=origin",
    "client_min_messages=notice",
    "session_preload_libraries=",
    "local_preload_libraries=",
    "role=none",
    "search_path=public",
)


def kept_limits(settings: Mapping[str, Any] | None, control: Control, major: int) -> dict[str, str]:
    """The limits that recovery compares: the larger of what the interval's settings and pg_control say.

    `settings` is settings.json of an interval (`pgcdp.postgres.session.settings`), or None: then pg_control alone
    tells, and limits that it does not hold are generous.
    """
    rows = {} if settings is None else {row["name"]: row["setting"] for row in settings["settings"]}
    limits = {name: str(rows[name]) for name in KEPT if name in rows and _SINCE.get(name, 0) <= major}
    for name in _CONTROL_LIMITS:
        limits[name] = str(max(int(limits.get(name, 0)), int(getattr(control, name))))
    known = _WAL_LEVELS.index(limits["wal_level"]) if limits.get("wal_level") in _WAL_LEVELS else 0
    limits["wal_level"] = _WAL_LEVELS[max(known, min(control.wal_level, len(_WAL_LEVELS) - 1))]
    for name in ("track_commit_timestamp", "wal_log_hints"):
        limits[name] = "on" if getattr(control, name) else limits.get(name, "off")
    limits.setdefault("max_replication_slots", "100")
    if limits["wal_level"] == "minimal":
        limits["max_wal_senders"] = "0"  # Postgres refuses senders without WAL for them
    return limits


def session_settings(settings: Mapping[str, Any] | None, major: int) -> dict[str, str]:
    """What production's configuration said at that point of what any session may set for itself.

    Formats, time zone, text search, planner and timeouts: the same statement gives the same answer by the same plan.
    An extension's settings are kept where everybody may see and set them; here, where its library is not loaded,
    Postgres would show them to everybody. `settings` as in `kept_limits`, whose values are in the units of pg_settings.
    """
    rows = () if settings is None else settings["settings"]
    fixed = {name for name, _, first, last in _OVERRIDES if first <= major <= last}
    return {
        row["name"]: str(row["setting"])
        for row in rows
        if row.get("source") in _FOR_ALL
        and (row.get("context") == "user" or row["name"] in _ALSO)
        and row["name"] not in fixed | _NOT_OF_SESSIONS_HERE
        and not row["name"].startswith(_NOT_OF_SESSIONS_PREFIXES)
        and _IN_A_FILE.fullmatch(row["name"])
        and not re.search(r"[\r\n\0]", str(row["setting"]))
    }


def configuration(
    settings: Mapping[str, Any] | None, control: Control, major: int, without: Collection[str] = ()
) -> str:
    """Text of a sandbox's postgresql.conf. `without`: names that are left at Postgres's defaults."""
    kept = session_settings(settings, major) | kept_limits(settings, control, major)
    lines = [f"{name} = '{_quoted(value)}'\n" for name, value in sorted(kept.items()) if name not in without]
    return "".join(["# a sandbox of pgcdp: limits and sessions as in production\n", *lines])


def options(major: int, fixed: Mapping[str, str]) -> tuple[str, ...]:
    """Options of a sandbox's command line, which override its configuration file.

    `fixed` are settings that depend on its place (socket directory, port, hba_file, ...); they win over all others.
    """
    overrides = {name: value for name, value, first, last in _OVERRIDES if first <= major <= last} | dict(fixed)
    return tuple(word for name, value in overrides.items() for word in ("-c", f"{name}={value}"))


_REFUSED = re.compile(r'] LOG:  [^"]*parameter "([^"]+)"')


def refused(log: str) -> frozenset[str]:
    """Settings of the configuration file that Postgres did not start with, by the first of them that it told."""
    return frozenset(_REFUSED.findall(log) if re.search(r'configuration file "[^"]+" contains errors', log) else ())


_HBA_WORDS = ("all", "sameuser", "samerole", "samegroup", "replication")
_HBA_PASSWORDS = ("md5", "scram-sha-256", "password")
# How somebody may have come to production whom a rule of that kind is for. By Kerberos: a clone cannot ask for tickets.
_HBA_WAYS: dict[str, frozenset[str]] = {
    "host": frozenset(("plain", "tls")),
    "hostnogssenc": frozenset(("plain", "tls")),
    "hostssl": frozenset(("tls",)),
    "hostnossl": frozenset(("plain",)),
    "hostgssenc": frozenset(),
}
_LOOPBACK = IPv4Address("127.0.0.1")


def hba_lines(settings: Mapping[str, Any] | None, trust: bool) -> list[str]:
    """Lines of pg_hba.conf for connections over TCP, which all come from 127.0.0.1, not encrypted.

    Production's own rules, as the interval's settings tell them. Who would be let in there from 127.0.0.1, encrypted or
    not, is let in by the same password; nobody else is. What another method than a password would decide is refused,
    since nobody outside can be asked; so is trust over SSL, which may have asked for a certificate, and all that
    GSSAPI encrypts. Where the rules are not known: passwords. With `trust`: anybody.
    """
    if trust:
        return ["host all all 127.0.0.1/32 trust"]
    rules = None if settings is None else settings.get("hba")
    if settings is None or rules is None:
        return ["host all all 127.0.0.1/32 scram-sha-256"]
    ssl = any(row["name"] == "ssl" and row["setting"] == "on" for row in settings.get("settings", ()))
    ways = _HBA_WAYS["host"] if ssl else _HBA_WAYS["hostnossl"]
    lines = []
    for kind, databases, users, address, netmask, method in rules:
        here = _HBA_WAYS[kind] & ways
        if not here or not _may_be_loopback(address, netmask):
            continue
        lets_in = method in _HBA_PASSWORDS or (method == "trust" and kind != "hostssl")
        for_all = databases == users == ["all"] and (netmask is not None or address == "all")
        if for_all and not lets_in and here != ways:  # nobody comes that way, but still the other
            ways -= here
            continue
        names = [",".join(map(_hba_name, group)) for group in (databases, users)]
        lines.append(
            " ".join(["host", *names, address, *([netmask] if netmask else []), method if lets_in else "reject"])
        )
    return lines


def _may_be_loopback(address: str, netmask: str | None) -> bool:
    """Whether a rule's address may be 127.0.0.1: without a netmask it is a word or a name."""
    if netmask is None:
        return True
    if ":" in address:
        return False
    mask = int(IPv4Address(netmask))
    return int(IPv4Address(address)) & mask == int(_LOOPBACK) & mask


def _hba_name(name: str) -> str:
    if name in _HBA_WORDS or name.startswith("+"):
        return name
    return '"' + name.replace('"', '""') + '"'


def session_options(extra: Sequence[str] = ()) -> str:
    """Options of a connection to a sandbox: they beat what ALTER ROLE and ALTER DATABASE left in the image."""
    return " ".join(f"-c {option}" for option in (*_SESSION_OPTIONS, *extra))


def _quoted(value: str) -> str:
    return value.replace("\\", "\\\\").replace("'", "''")
