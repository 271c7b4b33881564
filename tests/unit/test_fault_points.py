"""Each place where bytes become durable has a fault point, and what users install has none."""

from __future__ import annotations

from tests.faults.points import ROOT, engine_places_without, engine_points, python_places_without, python_points
from tests.fix_engine import _plain_program

TESTED = {
    "faults/rounds.py": (
        "store.frames.", "store.bundle.", "store.image.", "store.image_files.", "store.open_interval.",
        "intervals.stages.Stages.", "recovery.merged.",
    ),
    "unit/test_failing_store.py": (
        "recovery.joining", "recovery.expiring", "recovery.sweeping.sweep", "store.thinning", "store.base",
    ),
    "unit/test_failing_files.py": (
        "store.catalog.", "store.gaps.keep.", "store.gaps.announce.", "store.history.", "store.layout.", "store.lease.",
        "store.let_go.", "store.notes.", "store.open_views.", "store.parquet.", "store.rebuild.", "store.reserve.",
        "store.rewinds.keep.",
        "store.scrub_record.", "wrapped.write.", "wrapped.mend.",
        "twice.Twice.write.", "twice.Twice.remove.",
    ),
    "unit/test_renewing.py": ("capture.renewing.", "capture.journal."),
    "crash/test_faults_of_index.py": ("intervals.indexing.", "intervals.readout."),
    "crash/test_faults_of_commands.py": (
        "rewinding.", "recovery.rewind.", "postgres.timelines.", "growing.", "config.", "healing.", "remaking.",
        "extending.", "capture.same_parts.", "capture.copying.", "capture.fingerprint.", "capture.held.",
        "capture.home.", "capture.protect.", "capture.volumes.", "recovery.restore.",
        "recovery.places.", "intervals.applying.",
    ),
}  # fmt: skip
"""By which names of points which test goes to them."""
REMOVED_LATER = {"recovery.sweeping._remove.unlink"}
"""What is not removed there is nothing that counts, and is removed the next time."""
NO_DISK = {
    "control.c: unlink(path);",
    "control.c: unlink(c->path);",
    "show_view.c: unlink(s->socket);",
    "overlay.c: ftruncate(o->fd, (off_t)bytes) < 0))",
    "held.c: unlink(path);",
    "holder.c: unlink(o.socket);",
    "holder.c: if (*note < 0 || ftruncate(*note, FMT_HELD_NOTE_BYTES) < 0)",
    'holder.c: if (score < 0 || write(score, "-1000", 5) != 5)',
    "front_fuse.c: if (write(f->held->fuse, a.answer, a.answer_length) < 0 && errno != ENOENT)",
    "front_fuse.c: if (write(f->held->fuse, &resend, sizeof resend) < 0)",
    "runs.c: int rc = io_pwritev(point, v->fd, iov, iovs, block * BLOCK);",
    "overlay.c: int rc = fallocate(o->fd, mode, (off_t)(block * BLOCK), (off_t)(count * BLOCK)) < 0 ? -errno : 0;",
}
"""Sockets, files of the kernel, memory, a name handed on, and what is written to a clone, which is disposable."""


def test_nothing_in_the_engine_changes_a_disk_past_the_fault_points() -> None:
    assert set(engine_places_without()) == NO_DISK
    assert {name.split(".")[0] for name in engine_points()} == {"journal", "volume", "tracked", "clone", "wal"}


def test_nothing_in_the_durable_rooms_changes_a_disk_past_the_fault_points() -> None:
    assert python_places_without() == ["capture.volumes.set_cache_mode"], "a file of the kernel"
    assert {"store.frames.FrameWriter.sync.fdatasync", "store.bundle.publish.rename"} <= python_points()


def test_each_fault_point_is_in_a_test_by_name() -> None:
    """Of Python; those of the engine are all drawn by tests/faults/rounds.py and tracking.py."""
    for file, prefixes in TESTED.items():
        text = (ROOT / "tests" / file).read_text("utf-8")
        assert [each for each in prefixes if f'"{each}' not in text] == [], file
    known = tuple(prefix for prefixes in TESTED.values() for prefix in prefixes)
    assert {point for point in python_points() if not point.startswith(known)} == REMOVED_LATER


def test_the_engine_that_users_install_has_no_fault_points() -> None:
    program = _plain_program().read_bytes()
    assert b"PGCDP_TEST_FAULTS" not in program
