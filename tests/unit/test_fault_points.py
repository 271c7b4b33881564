"""Each place where bytes become durable has a fault point, and what users install has none."""

from __future__ import annotations

from tests.faults.points import engine_places_without, engine_points, python_places_without, python_points
from tests.fix_engine import _plain_program

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
    assert python_places_without() == []
    assert {"store.frames.FrameWriter.sync.fdatasync", "store.bundle.publish.rename"} <= python_points()


def test_the_engine_that_users_install_has_no_fault_points() -> None:
    program = _plain_program().read_bytes()
    assert b"PGCDP_TEST_FAULTS" not in program
