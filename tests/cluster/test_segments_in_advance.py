"""WAL segments that Postgres makes in advance are zeros: what recovery makes has to be told beside them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pgcdp.postgres.cluster import Binaries
from pgcdp.recovery.restored_spaces import created
from tests.fix_postgres import MakeCluster


@pytest.mark.every_variant
def test_a_tablespace_behind_the_first_segment_is_found_beside_segments_of_zeros(
    make_cluster: MakeCluster, pg_binaries: Binaries
) -> None:
    """pg_waldump asks any file for the size of segments: a restore was refused wherever that was one of zeros."""
    live = make_cluster(pg_binaries)
    space = live.own_directory("space")
    live.sql("checkpoint")
    live.sql("select pg_switch_wal()")
    live.sql(f"create tablespace away location '{space}'")
    live.kill()
    wal = live.pgdata / "pg_wal"
    for number in range(0x60, 0xA0):
        segment = wal / f"{1:08X}{0:08X}{number:08X}"
        with segment.open("xb") as file:
            file.truncate(16 << 20)
        os.chown(segment, live.user.uid, live.user.gid)
    assert list(created(live.pgdata, wal, pg_binaries).values()) == [Path(space)]


@pytest.mark.every_variant
def test_wal_that_ends_with_a_whole_segment_is_read_to_its_end(
    make_cluster: MakeCluster, pg_binaries: Binaries
) -> None:
    """No record behind it is looked for in a segment that does not exist."""
    live = make_cluster(pg_binaries)
    space = live.own_directory("space")
    live.sql("checkpoint")
    live.sql(f"create tablespace away location '{space}'")
    last = str(live.sql("select pg_walfile_name(pg_switch_wal())")[0][0])
    live.kill()
    wal = live.pgdata / "pg_wal"
    for file in wal.glob("0*"):
        if file.name > last:
            file.unlink()
    assert list(created(live.pgdata, wal, pg_binaries).values()) == [Path(space)]
