"""pg_control as pgcdp reads it, against pg_controldata of the same version."""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest

from pgcdp.errors import DamageError, PreconditionError
from pgcdp.postgres import control
from pgcdp.postgres.cluster import Binaries
from pgcdp.units import parse_lsn
from tests.fix_postgres import Live, MakeCluster

_STATES = {
    "shut down": control.State.SHUT_DOWN,
    "in production": control.State.IN_PRODUCTION,
}
_PLAIN = {
    "Database system identifier": "system_identifier",
    "pg_control version number": "version",
    "Catalog version number": "catalog_version",
    "Latest checkpoint's TimeLineID": "timeline",
    "Latest checkpoint's PrevTimeLineID": "previous_timeline",
    "max_connections setting": "max_connections",
    "max_worker_processes setting": "max_worker_processes",
    "max_wal_senders setting": "max_wal_senders",
    "max_prepared_xacts setting": "max_prepared_transactions",
    "max_locks_per_xact setting": "max_locks_per_transaction",
    "Database block size": "block_size",
    "Bytes per WAL segment": "wal_segment_size",
}
_LSNS = {
    "Latest checkpoint location": "checkpoint_lsn",
    "Latest checkpoint's REDO location": "redo_lsn",
    "Minimum recovery ending location": "min_recovery_lsn",
    "Backup start location": "backup_start_lsn",
    "Backup end location": "backup_end_lsn",
}


def told(live: Live) -> dict[str, str]:
    """What pg_controldata prints."""
    lines = live.program("pg_controldata", "-D", str(live.pgdata)).stdout.splitlines()
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def head(live: Live) -> bytes:
    return (live.pgdata / "global" / "pg_control").read_bytes()


def compare(live: Live) -> control.Control:
    found, said = control.parse(head(live)), told(live)
    assert found.crc_ok
    assert {name: getattr(found, name) for name in _PLAIN.values()} == {
        name: int(said[label]) for label, name in _PLAIN.items()
    }
    assert {name: getattr(found, name) for name in _LSNS.values()} == {
        name: parse_lsn(said[label]) for label, name in _LSNS.items()
    }
    epoch, xid = map(int, said["Latest checkpoint's NextXID"].split(":"))
    assert found.next_xid == (epoch << 32) | xid
    assert found.state == _STATES[said["Database cluster state"]]
    assert found.wal_level == ["minimal", "replica", "logical"].index(said["wal_level setting"])
    assert found.wal_log_hints == (said["wal_log_hints setting"] == "on")
    assert found.track_commit_timestamp == (said["track_commit_timestamp setting"] == "on")
    assert found.checksums == (said["Data page checksum version"] != "0")
    for label, seconds in (
        ("pg_control last modified", found.time),
        ("Time of latest checkpoint", found.checkpoint_time),
    ):
        assert datetime.strptime(said[label], "%a %b %d %H:%M:%S %Y") == datetime.fromtimestamp(seconds)
    return found


@pytest.fixture
def live(pg_binaries: Binaries, make_cluster: MakeCluster, monkeypatch: pytest.MonkeyPatch) -> Live:
    monkeypatch.setenv("LC_ALL", "C")
    return make_cluster(
        pg_binaries,
        max_prepared_transactions="7",
        wal_level="logical",
        wal_log_hints="on",
        max_connections="33",
        track_commit_timestamp="on",
        max_locks_per_transaction="77",
    )


def test_agrees_with_pg_controldata(live: Live) -> None:
    running = compare(live)
    assert (running.state, running.max_prepared_transactions) == (control.State.IN_PRODUCTION, 7)
    live.sql("checkpoint")
    assert compare(live).checkpoint_lsn > running.checkpoint_lsn
    live.stop()
    stopped = compare(live)
    assert stopped.state == control.State.SHUT_DOWN
    # An epoch of its own shows that all 64 bits of the next xid are read.
    live.program("pg_resetwal", "--epoch=5", "-D", str(live.pgdata))
    assert compare(live).next_xid >> 32 == 5


def test_every_flipped_bit_is_seen(live: Live) -> None:
    whole = head(live)
    crc_at = control._CRC_OFFSET[control.parse(whole).version]
    for place in range(0, crc_at + 4):
        changed = bytearray(whole)
        changed[place] ^= 1 << (place % 8)
        if 8 <= place < 12:
            with pytest.raises(PreconditionError, match="none of"):
                control.parse(changed)
            continue
        assert not control.parse(changed).crc_ok
        with pytest.raises(DamageError, match="checksum of pg_control is wrong"):
            control.parse_checked(changed, "it")
    changed = bytearray(whole)
    changed[crc_at + 4] ^= 1
    assert control.parse(changed).crc_ok, "the checksum covers nothing behind it"


def test_finds_control_writes_among_others(live: Live) -> None:
    whole, ours = head(live), control.parse(head(live)).system_identifier
    torn = bytearray(whole[:4096])
    torn[100] ^= 1
    foreign = bytearray(whole[:4096])
    foreign[0] ^= 1
    generator = np.random.default_rng(1)
    noise = generator.integers(0, 256, 4096 * 50, dtype=np.uint8).tobytes()
    shifted = bytes(512) + whole[: 4096 - 512]
    data = np.frombuffer(b"".join([noise, whole[:4096], bytes(torn), bytes(foreign), shifted, whole]), dtype=np.uint8)
    found = control.find_control_blocks(data, ours)
    assert [(at // 4096, each.checkpoint_lsn) for at, each in found] == [
        (50, control.parse(whole).checkpoint_lsn),
        (54, control.parse(whole).checkpoint_lsn),
    ]
    assert control.find_control_blocks(np.zeros(0, dtype=np.uint8), ours) == []


def test_refuses_what_it_does_not_know() -> None:
    with pytest.raises(DamageError, match="only 20 bytes"):
        control.parse(bytes(20))
    with pytest.raises(PreconditionError, match="version 1201"):
        control.parse(bytes(8) + (1201).to_bytes(4, "little") + bytes(500))


def test_layout_of_pg_control_h() -> None:
    """The offsets, computed anew from the struct definition as the C compiler aligns it."""
    checkpoint = (
        "redo Q,tli I,prev I,fpw ?,level i,next Q,oid I,multi I,off I,oxid I,odb I,om I,omdb I,time q,a I,b I,c I"
    )
    fields = (
        "system_identifier Q,version I,catalog_version I,state I,time q,checkpoint_lsn Q,"
        + ",".join(f"cp_{word}" for word in checkpoint.split(","))
        + ",!8 x,unlogged Q,min_recovery_lsn Q,mtli I,backup_start_lsn Q,backup_end_lsn Q,req ?,wal_level i,"
        "wal_log_hints ?,max_connections i,max_worker_processes i,max_wal_senders i,max_prepared_transactions i,"
        "max_locks_per_transaction i,track_commit_timestamp ?,align I,float d,block_size I,seg I,wblock I,"
        "wal_segment_size I,name I,keys I,toast I,lo I,byval ?,checksums I"
    )
    sizes = {"Q": 8, "q": 8, "d": 8, "I": 4, "i": 4, "?": 1, "x": 0}
    at, places = 0, {}
    for name, code in (word.split() for word in re.split(",", fields)):
        size = 8 if name.startswith("!") else sizes[code]
        at = -(-at // size) * size
        places[name] = at
        at += sizes[code]
    known = {name: offset for name, offset, _ in control._FIELDS}
    aliases = {"redo_lsn": "cp_redo", "timeline": "cp_tli", "previous_timeline": "cp_prev", "next_xid": "cp_next",
               "checkpoint_time": "cp_time"}  # fmt: skip
    assert known == {name: places[aliases.get(name, name)] for name in known}
    assert {1300: at + 32, 1700: at + 32, 1800: at + 1 + 32 + 3} == control._CRC_OFFSET


def test_reads_a_whole_directory(live: Live, tmp_path: Path) -> None:
    assert (live.pgdata / "global" / "pg_control").stat().st_size == control.FILE_BYTES
    assert "checkpoint " in control.describe(live.control())
