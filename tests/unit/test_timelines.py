"""What a cluster that went back sends to its archive: nothing twice, and nothing of it is left out."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import pytest

from pgcdp.postgres import timelines
from pgcdp.proc import user_with_id

ME = user_with_id(os.geteuid())
SEGMENT = 16 << 20


class Cluster:
    """A pg_wal: `status` is {name: "done", "ready" or ""}."""

    def __init__(self, place: Path) -> None:
        self.pg_wal = place
        (place / "archive_status").mkdir(parents=True)

    def has(self, status: dict[str, str], histories: Iterable[str] = ()) -> Cluster:
        for name, state in status.items():
            (self.pg_wal / name).write_bytes(b"wal")
            if state:
                (self.pg_wal / "archive_status" / f"{name}.{state}").touch()
        for name in histories:
            (self.pg_wal / name).write_text(f"history {name}")
        return self

    def told(self) -> dict[str, str]:
        states = {}
        for path in self.pg_wal.iterdir():
            found = [
                state
                for state in ("done", "ready")
                if (self.pg_wal / "archive_status" / f"{path.name}.{state}").exists()
            ]
            assert len(found) <= 1, path.name
            if path.is_file():
                states[path.name] = found[0] if found else ""
        return states


def seg(timeline: int, number: int) -> str:
    return f"{timeline:08X}{number // 256:08X}{number % 256:08X}"


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    return tmp_path / "timelines"


def test_what_was_archived_since_is_not_archived_again(tmp_path: Path, kept: Path) -> None:
    """Segments 3 to 7 were archived; of 3 and 4 the archiver's notes are gone, since they were recycled."""
    now = Cluster(tmp_path / "now").has({seg(1, 5): "done", seg(1, 6): "done", seg(1, 7): "done", seg(1, 8): ""})
    timelines.keep(now.pg_wal, kept, True)
    then = Cluster(tmp_path / "then").has({seg(1, 2): "done", seg(1, 3): "ready", seg(1, 4): "", seg(1, 5): ""})
    timelines.put(kept, then.pg_wal, ME)
    assert then.told() == {seg(1, n): "done" for n in range(2, 6)}


def test_a_history_file_that_a_kill_left_to_root_is_given_to_postgres(tmp_path: Path, kept: Path) -> None:
    """Postgres cannot read it otherwise, and `up` could never finish the rewind."""
    now = Cluster(tmp_path / "now").has({}, ["00000002.history", "00000003.history"])
    timelines.keep(now.pg_wal, kept, True)
    then = Cluster(tmp_path / "then").has({}, ["00000002.history"])
    nobody = user_with_id(65534)
    timelines.put(kept, then.pg_wal, nobody)
    assert [path.stat().st_uid for path in sorted(then.pg_wal.glob("*.history"))] == [nobody.uid] * 2


def test_an_idle_archiver_has_no_notes_left(tmp_path: Path, kept: Path) -> None:
    """What was recycled was archived, though nothing is left that says so."""
    now = Cluster(tmp_path / "now").has({seg(1, 8): "", seg(1, 9): ""})
    timelines.keep(now.pg_wal, kept, True)
    then = Cluster(tmp_path / "then").has({seg(1, 6): "ready", seg(1, 7): "", seg(1, 8): ""})
    timelines.put(kept, then.pg_wal, ME)
    assert then.told() == {seg(1, 6): "done", seg(1, 7): "done", seg(1, 8): ""}


def test_what_was_never_archived_still_is_to_be(tmp_path: Path, kept: Path) -> None:
    now = Cluster(tmp_path / "now").has({seg(1, 3): "done", seg(1, 4): "ready", seg(1, 5): "ready", seg(1, 6): ""})
    timelines.keep(now.pg_wal, kept, True)
    then = Cluster(tmp_path / "then").has({seg(1, 3): "ready", seg(1, 4): "ready", seg(1, 5): ""})
    timelines.put(kept, then.pg_wal, ME)
    assert then.told() == {seg(1, 3): "done", seg(1, 4): "ready", seg(1, 5): ""}


def test_a_lower_name_on_another_timeline_was_not_archived_by_that(tmp_path: Path, kept: Path) -> None:
    now = Cluster(tmp_path / "now").has({seg(2, 9): "done", seg(2, 10): ""}, ["00000002.history"])
    timelines.keep(now.pg_wal, kept, True)
    then = Cluster(tmp_path / "then").has({seg(1, 4): "ready", seg(2, 5): "ready"})
    timelines.put(kept, then.pg_wal, ME)
    assert then.told() == {seg(1, 4): "ready", seg(2, 5): "done", "00000002.history": ""}


def test_notes_of_an_earlier_rewind_stay(tmp_path: Path, kept: Path) -> None:
    """After going back, pg_wal is of then: it must not lower what is known of the archive."""
    timelines.keep(Cluster(tmp_path / "a").has({seg(1, 7): "done", seg(5, 9): ""}).pg_wal, kept, True)
    timelines.keep(Cluster(tmp_path / "b").has({seg(1, 2): "done", seg(5, 3): ""}).pg_wal, kept, True)
    then = Cluster(tmp_path / "then").has({seg(1, 6): "ready", seg(1, 7): "ready", seg(1, 8): "ready", seg(5, 8): ""})
    timelines.put(kept, then.pg_wal, ME)
    assert then.told() == {seg(1, 6): "done", seg(1, 7): "done", seg(1, 8): "ready", seg(5, 8): "done"}


def test_all_histories_come_first_and_each_is_archived_once(tmp_path: Path, kept: Path) -> None:
    now = Cluster(tmp_path / "now").has({seg(3, 9): ""}, ["00000002.history", "00000003.history"])
    (now.pg_wal / "archive_status" / "00000002.history.done").touch()
    timelines.keep(now.pg_wal, kept, True)
    assert timelines.known(kept) == [2, 3]
    then = Cluster(tmp_path / "then").has({seg(1, 5): ""})
    timelines.put(kept, then.pg_wal, ME)
    assert then.told() == {seg(1, 5): "", "00000002.history": "done", "00000003.history": ""}
    assert (then.pg_wal / "00000003.history").read_text() == "history 00000003.history"


def test_the_segment_in_which_the_old_timeline_was_left_is_no_longer_there(tmp_path: Path) -> None:
    """Archived under its own name its end would be missing, or the archive would refuse it."""
    found = Cluster(tmp_path / "w").has({seg(1, 256): "ready", seg(1, 257): "ready", seg(4, 257): ""})
    (found.pg_wal / "00000004.history").write_text(
        "1\t0/3000000\tbefore\n\n# a comment\n1\t1/1000060\tno recovery target specified\n"
    )
    timelines.switched(found.pg_wal, 4, SEGMENT, True, ME)
    assert found.told() == {seg(1, 256): "ready", seg(4, 257): "", "00000004.history": "ready"}
    timelines.switched(found.pg_wal, 4, SEGMENT, True, ME)  # again, after a kill
    assert found.told() == {seg(1, 256): "ready", seg(4, 257): "", "00000004.history": "ready"}


def test_without_an_archive_nothing_is_noted(tmp_path: Path, kept: Path) -> None:
    timelines.keep(Cluster(tmp_path / "now").has({seg(1, 5): ""}, ["00000002.history"]).pg_wal, kept, False)
    then = Cluster(tmp_path / "then").has({seg(1, 3): ""})
    timelines.put(kept, then.pg_wal, ME)
    assert then.told() == {seg(1, 3): "", "00000002.history": ""}
    (then.pg_wal / "00000003.history").write_text("1\t0/3000060\tx\n")
    timelines.switched(then.pg_wal, 3, SEGMENT, False, ME)
    assert then.told() == {"00000002.history": "", "00000003.history": ""}
