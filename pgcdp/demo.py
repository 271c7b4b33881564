"""All of pgcdp on a throw-away cluster: load, a bad DELETE, more load, and ways back around it that are proven right.

Everything lies in one fresh directory below /var/tmp: the cluster, the store, and what is otherwise below /
(PGCDP_ROOT). Afterwards, also after Ctrl-C, nothing of it is left, unless it is to be kept. When a step fails, nothing
runs any more and nothing is mounted, but the directory stays: what went wrong is in its logs.
"""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pgcdp import api, proc, transactions
from pgcdp.errors import PgcdpError
from pgcdp.postgres import cluster, session
from pgcdp.progress import Progress, Report
from pgcdp.records import Target
from pgcdp.recovery.salvage import Wanted
from pgcdp.throwaway import (
    SET,
    Throwaway,
    await_orders,
    await_until,
    end_at_once,
    end_load,
    how_to_remove,
    make_cluster,
    newest_binaries,
    pgbench,
    pgbench_command,
    remove,
    rooted_at,
    uninterrupted,
    with_place,
)

PAID = 1000
"""Orders that the bad statement deletes; the load adds others but never touches these."""
BAD_STATEMENT = "DELETE FROM orders WHERE status = 'paid'"
SIZE = 1 << 30
JOURNAL_LIMIT = 512 << 20
OWNER = "postgres"
TABLE = """
CREATE TABLE orders (id bigserial PRIMARY KEY, status text NOT NULL, amount numeric, made timestamptz DEFAULT now());
INSERT INTO orders (status, amount) SELECT 'paid', 10 + n % 90 FROM generate_series(1, {paid}) AS n;
"""
LOAD = "INSERT INTO orders (status, amount) VALUES ('new', 10 + random() * 90);\n"


def run(*, keep: bool, progress: Report) -> dict[str, Any]:
    """Play the demo; `keep` leaves everything running.

    Returns {"ok", "seconds", "directory", "kept", "steps", "captured", "restores", "next", "remove"}, as docs/json.md
    says. Raises what the use cases raise; the hint then says where the logs are.
    """
    proc.check_root()
    user = proc.user_named(OWNER)
    binaries = newest_binaries(user)
    began = time.monotonic()
    directory = Path(tempfile.mkdtemp(prefix="pgcdp-demo-", dir="/var/tmp"))
    directory.chmod(0o755)  # Postgres's user must get through to the data directory
    demo = Throwaway(directory, progress, binaries, user)
    with rooted_at(demo.root):
        try:
            make_cluster(demo)
            _protect(demo)
            points = _make_the_mistake(demo)
            _prove(demo, points)
            _step_through(demo)
            _rewind_and_undo(demo, points)
            captured = _captured()
        except Exception as error:
            if not keep:
                progress(Progress("ending what still runs"))
                uninterrupted(end_at_once, demo)
            told = with_place(error, demo, keep)
            raise told from told.__cause__
        except BaseException:
            if not keep:
                progress(Progress("cleaning up"))
                uninterrupted(remove, demo)
            raise
        finally:
            end_load(demo)
        if not keep:
            progress(Progress("cleaning up"))
            uninterrupted(remove, demo)
    return {
        "ok": all(restore["ok"] for restore in demo.restores),
        "seconds": round(time.monotonic() - began, 3),
        "directory": str(directory),
        "kept": keep,
        "steps": demo.steps,
        "captured": captured,
        "restores": demo.restores,
        "next": _next(demo, points, keep),
        "remove": how_to_remove(demo) if keep else None,
    }


def _protect(demo: Throwaway) -> None:
    with demo.step("protecting it while it runs"):
        api.protect(
            SET,
            demo.pgdata,
            demo.store,
            size=SIZE,
            journal_limit=JOURNAL_LIMIT,
            cut=("checkpoint", "5min"),
            yes=True,
        )
        await_until(lambda: _window()["from_write"] is not None, "the first boundary after the baseline")
    with demo.step("filling it: pgbench -i, and a table of orders") as told:
        pgbench(demo, "-i", "-q", "-s", "3")
        for statement in TABLE.format(paid=PAID).strip().split("\n"):
            demo.ask(statement)
        api.cut(SET)
        told["detail"] = f"{PAID} paid orders, then a boundary"


@dataclass(frozen=True)
class _Points:
    """Where the demo restores to: a boundary, and just before and just behind the bad transaction, which was found."""

    boundary: int
    xid: int


def _make_the_mistake(demo: Throwaway) -> _Points:
    boundary = int(api.info(SET)["intervals"][-1]["number"])
    script = demo.directory / "orders.sql"
    script.write_text(LOAD)
    script.chmod(0o644)  # whatever the umask says
    log_file = demo.directory / "pgbench.log"
    with demo.step("load: pgbench and new orders, 4 clients") as told:
        # Longer than the demo lasts; it is ended when there was enough of it.
        words = ("-n", "-c", "4", "-j", "1", "-T", "3600", "-b", "tpcb-like@3", "-f", f"{script}@2")
        pid = proc.spawn(pgbench_command(demo, *words), output=log_file, user=demo.user, env=cluster.environment())
        demo.load = (pid, proc.start_time(pid))
        await_orders(demo, 2000)
        told["detail"] = f"{demo.orders('new')} new orders"
    with demo.step(f"the mistake: {BAD_STATEMENT}") as told:
        demo.ask(BAD_STATEMENT)
        told["detail"] = f"{demo.orders('paid')} paid orders are left"
    with demo.step("more load, as nobody has noticed") as told:
        await_orders(demo, demo.orders("new") + 2000)
        end_load(demo)
        told["detail"] = f"{demo.orders('new')} new orders"
    with demo.step("checkpoint, cutting the interval"):
        api.cut(SET)
    return _Points(boundary, _find(demo))


def _find(demo: Throwaway) -> int:
    """What a DBA types who knows what was run, but not when: `pgcdp find`."""
    with demo.step(f'finding it: pgcdp find "{BAD_STATEMENT}"') as told:
        found = api.find(SET, BAD_STATEMENT)["transactions"]
        listed = api.log(SET, limit=1)["total"]
        if len(found) != 1 or found[0]["tables"][0]["deleted"] != PAID:
            raise PgcdpError(f"find names {len(found)} transactions, not the one", "pgcdp demo --keep, then pgcdp log")
        told["detail"] = f"{transactions.line(found[0])}, among {listed} transactions"
    return int(found[0]["xid"])


def _prove(demo: Throwaway, points: _Points) -> None:
    for name, target, paid in (
        (f"boundary {points.boundary}, before the load", Target("boundary", points.boundary), PAID),
        ("exactly before the mistake", Target("xid", points.xid, exclusive=True), PAID),
        ("exactly behind it", Target("xid", points.xid), 0),
    ):
        with demo.step(f"verifying {name}") as told:
            assertion = demo.directory / "assertion.sql"
            assertion.write_text(f"SELECT count(*) = {paid} FROM orders WHERE status = 'paid';\n")
            value = api.verify(SET, target, sql_file=assertion)
            result = value["results"][0]
            passed = sum(check["ok"] for check in result["checks"])
            told["detail"] = f"{passed} of {len(result['checks'])} checks passed, {paid} paid orders expected"
        demo.restores.append({"name": name, "paid_orders": paid, **result})
    _bring_back(demo, points)


def _bring_back(demo: Throwaway, points: _Points) -> None:
    """What a DBA does next: a directory as it was just before, and Postgres on it; then the rows, in production."""
    with demo.step(f'restoring to just before it: --before "{BAD_STATEMENT}"') as told:
        place = demo.directory / "restored"
        value = api.restore(SET, Target("newest"), before=BAD_STATEMENT, to_directory=place)
        sockets = demo.directory / "restored-sockets"
        sockets.mkdir(mode=0o700)
        os.chown(sockets, demo.user.uid, demo.user.gid)
        options = ("-c", f"unix_socket_directories={sockets}")
        command = cluster.command_line(demo.binaries, place, *options)
        cluster.start(command, place, demo.user, demo.directory / "restored.log")
        try:
            paid = int(demo.ask("SELECT count(*) FROM orders WHERE status = 'paid'", sockets))
            row = demo.ask("SELECT orders::text FROM orders WHERE status = 'paid' ORDER BY id LIMIT 1", sockets)
        finally:
            cluster.stop(place)
        told["detail"] = f"{paid} paid orders are in it, the first {row}"
    _remember(demo, "exactly before the mistake, in a directory", value, paid, PAID)
    with demo.step("putting the rows back into the live table: salvage --diff --apply") as told:
        target = Target("xid", points.xid, exclusive=True)
        value = api.salvage(SET, target, Wanted(("orders",)), diff=True, agree=lambda difference: None)
        table = value["tables"][0]
        paid = demo.orders("paid")
        told["detail"] = (
            f"{table['put_back']['inserted']} rows put back, {table['difference']['added']} newer ones kept, "
            f"{paid} paid orders in production"
        )
    whole = table["put_back"] == {"inserted": PAID, "updated": 0}
    _remember(demo, "the rows of the mistake, back in production", value, paid, PAID if whole else -1)


def _step_through(demo: Throwaway) -> None:
    """A clone opens in place, whatever the size; one commit onward, the rows are gone from it."""
    name = "before-mistake"
    with demo.step(f'a clone just before it: pgcdp clone --before "{BAD_STATEMENT}"') as told:
        made = api.clone(SET, Target("newest"), before=BAD_STATEMENT, name=name)
        paid = _paid_in(made["dsn"])
        told["detail"] = f"a running Postgres after {made['seconds']:.1f} s, with {paid} paid orders"
    _remember(demo, "a clone just before the mistake", made, paid, PAID)
    with demo.step(f"one commit onward: pgcdp step {name} 1 --commit") as told:
        stepped = api.step(name, 1, commits=True)
        paid = _paid_in(stepped["dsn"])
        xids = ", ".join(str(each["xid"]) for each in stepped["transactions_in"])
        told["detail"] = (
            f"writes passed: {stepped['writes_passed']}; transaction {xids} came in, {paid} paid orders are left"
        )
    _remember(demo, "the same clone, one commit onward", stepped, paid, 0)
    api.destroy(name)


def _rewind_and_undo(demo: Throwaway, points: _Points) -> None:
    """Production itself goes back, and forth again: nothing is lost by it."""
    new = demo.orders("new")
    with demo.step("rewinding production itself to just before it: restore --in-place") as told:
        value = api.rewind(SET, Target("xid", points.xid, exclusive=True), agree=lambda resolved: None)
        paid = demo.orders("paid")
        told["detail"] = (
            f"{value['bytes'] >> 20} MiB written back, down for {value['down_seconds']:.1f} s, {paid} paid and "
            f"{demo.orders('new')} new orders"
        )
    _remember(demo, "production, rewound to just before the mistake", value, paid, PAID)
    with demo.step(f"undoing that: restore --in-place --target-name {value['undo']}") as told:
        undone = api.rewind(SET, Target("name", name=value["undo"]), agree=lambda resolved: None)
        again = demo.orders("new")
        told["detail"] = f"{demo.orders('paid')} paid and {again} new orders, as before"
    _remember(demo, "production, as before the rewind", undone, demo.orders("paid"), PAID if again == new else -1)


def _paid_in(dsn: str) -> int:
    with session.connect_to(dsn) as connection:
        rows = session.query(connection, "SELECT count(*) FROM orders WHERE status = 'paid'").rows
    return int(rows[0][0]) if rows else -1


def _remember(demo: Throwaway, name: str, value: dict[str, Any], paid: int, expected: int) -> None:
    ok = paid == expected and value.get("verified", True)
    demo.restores.append(
        {
            "name": name,
            "paid_orders": paid,
            "recovery_point": value["recovery_point"],
            "ok": ok,
            "seconds": value["seconds"],
            "checks": [],
        }
    )


def _window() -> dict[str, Any]:
    window: dict[str, Any] | None = api.status(SET)["recovery_window"]
    return window or {"from_write": None}


def _captured() -> dict[str, Any]:
    intervals = api.info(SET)["intervals"]
    return {
        "intervals": len(intervals),
        "writes": sum(interval["writes"] for interval in intervals),
        "bytes_written": sum(interval["bytes_written"] for interval in intervals),
        "stored_bytes": sum(sum(interval["stored"].values()) for interval in intervals),
    }


def _next(demo: Throwaway, points: _Points, keep: bool) -> list[str]:
    """Commands to look further with."""
    if not keep:
        return ["pgcdp demo --keep", "pgcdp protect --help"]
    prefix = f"PGCDP_ROOT={demo.root} pgcdp"
    return [
        f"{prefix} status",
        f"{prefix} info",
        f'{prefix} find "{BAD_STATEMENT}"',
        f"{prefix} log --op delete",
        f"{prefix} verify --target-xid {points.xid} --exclusive",
        f"psql -h {demo.sockets} -U postgres",
    ]
