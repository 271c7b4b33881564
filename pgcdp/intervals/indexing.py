"""An interval's transaction index beside its writes, before it is published: made, or made again after a kill."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pgcdp.capture.filemap import FileMap
from pgcdp.errors import DamageError, PgcdpError, PreconditionError
from pgcdp.fsio import read_file, read_json, write_file, write_json
from pgcdp.intervals.events import full_xid
from pgcdp.intervals.files import changed_files
from pgcdp.intervals.readout import NOTES, SEGMENT_BYTES, Cluster, Readout, SlowError, read_wal
from pgcdp.intervals.superblocks import superblocks
from pgcdp.intervals.transactions import Past, TransactionIndex
from pgcdp.postgres.relations import Look
from pgcdp.postgres.wal import PAGE, Manager, Note, is_checkpoint, of_database, opened_timeline, pack_notes, read_notes
from pgcdp.records import COMMITTED, COMMITTED_PREPARED, Boundary, Rewind
from pgcdp.sealing import data_key_of
from pgcdp.store.base import places_back
from pgcdp.store.bundle import CATALOG_NOTES, EVENTS, WAL_STATE, Bundle, IndexFiles, rewinds_of
from pgcdp.store.files import write_files
from pgcdp.store.frames import FileSummary, summary_of
from pgcdp.store.layout import Store
from pgcdp.store.notes import make_notes, notes_of
from pgcdp.store.open_interval import OpenInterval
from pgcdp.store.transactions import STILL, read_look, write_look, write_transactions, write_wal
from pgcdp.units import format_lsn

log = logging.getLogger(__name__)

LONG_HEADER = 40
"""Bytes of the header of a segment's first page; that of other pages has 24."""


@dataclass(frozen=True)
class Start:
    """Where reading an interval's WAL begins: with what the one before left, or behind its boundary's checkpoint.

    After a rewind in place it begins behind that, on the timeline which that has opened.
    """

    store: Store
    cluster: Cluster
    boundary: Boundary
    state: Path | None
    past: Past

    @classmethod
    def of(cls, store: Store, boundary: Boundary, settings: dict[str, Any], system_identifier: int) -> Start:
        """Behind a boundary of the store. `settings`: any of the cluster's, for the size of WAL segments."""
        place = store.interval(boundary.number)
        state = place / WAL_STATE
        notes: list[Note] = []
        with suppress(FileNotFoundError):
            notes = read_notes(read_file(place / CATALOG_NOTES))
        return cls(
            store,
            cluster_of(store, system_identifier, settings),
            boundary,
            state if state.exists() else None,
            Past(newest_look(store, boundary.number), notes),
        )

    def read(self, intervals: list[Path], rewinds: Sequence[Rewind] = (), *, tables: Path, **more: Any) -> Readout:
        """Read the WAL behind the boundary: as `readout.read_wal`. `rewinds`: those behind the boundary."""
        more |= {"tables": tables, "key": data_key_of(self.store.path)}
        if rewinds:
            return self._read_around(intervals, rewinds, **more)
        start_lsn = 0 if self.state else self.boundary.checkpoint_lsn
        behind = self.boundary.write  # the journal may begin before it, and lack what lies between
        found = read_wal(self.cluster, intervals, start_lsn=start_lsn, behind=behind, state=self.state, **more)
        return found if self.state else replace(found, notes=[*self._really_lost(found.notes)])

    def _really_lost(self, notes: list[Note]) -> Iterator[Note]:
        """Without a state, reading begins with the first page behind the boundary, and what lies before it is told as
        lost: it is not, as far as the interval before has read it. What lies before the baseline is nobody's loss."""
        for note in notes:
            if note.rmid != Manager.LOST or note.lsn != self.boundary.checkpoint_lsn:
                yield note
            elif self.boundary.number and _more_than_a_header(known_to := self._known_to(), note.end_lsn):
                yield replace(note, lsn=max(note.lsn, known_to))

    def _known_to(self) -> int:
        """The LSN up to which the interval before was read; 0 when it was not."""
        with suppress(DamageError):
            return int((Bundle.open(self.store, self.boundary.number).transactions or {}).get("wal_to", 0))
        return 0

    def _read_around(
        self, intervals: list[Path], rewinds: Sequence[Rewind], *, upto: int | None = None, **more: Any
    ) -> Readout:
        """The marks before the first rewind, then what lies behind the last one.

        Postgres was shut down at the boundary, and before that rewind nobody started it. What is between two rewinds is
        of a cluster that nobody could reach. Behind the last one the new timeline's first segment begins with a copy of
        the old one's: what is new begins with the checkpoint that opens it. In the copy others may be read again, which
        opened timelines that are known already.
        """
        first, last = rewinds[0].begin - 1, rewinds[-1].end
        aside = {**more, "save_state": None, "settle_upto": None}
        head = self.read(intervals, **aside, upto=first if upto is None else min(first, upto))
        if len(head.ends):
            raise PreconditionError(
                f"transactions ended between boundary {self.boundary.number} and the rewind at write {first + 1}"
            )
        if last is None or (upto is not None and upto <= last):
            return head
        found = read_wal(self.cluster, intervals, behind=last, upto=upto, **{**more, "save_state": None})
        known = self._newest_timeline(intervals, rewinds, aside)
        begin = next((note.lsn for note in found.notes if opened_timeline(note) > known), None)
        if begin is None:
            return replace(head, notes=[*head.notes, *(note for note in found.notes if note.rmid == Manager.MARK)])
        found = read_wal(self.cluster, intervals, start_lsn=begin, behind=last, upto=upto, **more)
        return replace(found, notes=[*head.notes, *found.notes], left_out=head.left_out + found.left_out)

    def _newest_timeline(self, intervals: list[Path], rewinds: Sequence[Rewind], aside: dict[str, Any]) -> int:
        """The highest timeline before the last rewind: each one opens one that was never used."""
        found = self.boundary.timeline
        for one, following in pairwise(rewinds):
            if one.end is not None:
                read = read_wal(self.cluster, intervals, behind=one.end, upto=following.begin - 1, **aside)
                found = max(found, *map(opened_timeline, read.notes), 0)
        return found

    def past_of(self, rewinds: Sequence[Rewind]) -> Past:
        """What is known of the catalogs behind the boundary; after a rewind, as they were where it went to."""
        if not rewinds or rewinds[-1].end is None:
            return self.past
        spans = [span for span in self.store.spans() if span.last <= self.boundary.number]
        for span in reversed(spans):
            if Bundle.at(self.store, span).interval.from_write <= rewinds[-1].to_write:
                return Past(newest_look(self.store, span.last), [])
        base = self.store.base_number()  # the rewind may have gone to the oldest boundary itself
        return Past(newest_look(self.store, base) if base else None, [])


def _more_than_a_header(known_to: int, lsn: int) -> bool:
    """Whether WAL lies between what is known and a record, besides the header of the page that begins there."""
    return lsn - known_to > (0 if known_to % PAGE else LONG_HEADER)


def cluster_of(store: Store, system_identifier: int, settings: dict[str, Any]) -> Cluster:
    """What an interval's settings say of the WAL. The images are of any boundary: a filesystem's form stays."""
    values = {row["name"]: row["setting"] for row in settings.get("settings", ())}
    size = int(values.get("wal_segment_size", SEGMENT_BYTES))
    images = tuple(store.image / f"{volume.name}.img" for volume in store.volumes)
    holes = values.get("wal_init_zero") == "off"
    blocks = superblocks(store) if holes and store.encrypted else ()
    return Cluster(system_identifier, size, holes, images, blocks)


def newest_look(store: Store, number: int) -> Look | None:
    """The look at the catalogs that lies in interval `number` or the nearest one before it; a damaged one is passed."""
    for place in places_back(store, number):
        try:
            look = read_look(place)
        except DamageError as damage:
            log.warning("%s", damage)
            continue
        if look is not None:
            return look
    return None


Behind = Callable[[], tuple[Path, int]]
"""The journal, and its last durable write."""


def index_interval(
    opened: OpenInterval, boundary: Boundary, begin: Callable[[], Start], behind: Behind | None = None
) -> IndexFiles | None:
    """Index what a finished, not yet published interval holds, durably. None when that failed: the log says why.

    With `behind`, WAL that is durable only with a write behind the boundary (wal_init_zero = off) is given that write.
    The index is made of what is stored anyway. Whatever is wrong with it, or with what `begin` finds in the intervals
    before, must not keep an interval from the store.
    """
    try:
        start = begin()
        more = _behind(behind) if behind and start.cluster.holes else {}
        try:
            return _index(opened, boundary, start, more)
        except PgcdpError as error:
            if start.state is None or isinstance(error, SlowError):
                raise
            log.warning("interval %d: the WAL is read anew from its beginning: %s", opened.number, error)
            return _index(opened, boundary, replace(start, state=None), more)
    except (PgcdpError, OSError) as error:
        log.error("interval %d: its transactions cannot be listed: %s", opened.number, error)
    except Exception:  # a bug in us
        log.exception("interval %d: its transactions cannot be listed", opened.number)
    (opened.path / WAL_STATE).unlink(missing_ok=True)  # the next one begins behind the boundary, not with this
    return None


def index_files(
    opened: OpenInterval, forward: NDArray[np.void], before: FileMap | None, now: FileMap
) -> FileSummary | None:
    """Write down whose the blocks of a forward map are, durably. None when that failed: the log says why."""
    try:
        return write_files(opened.path, changed_files(forward, before, now))
    except Exception:  # it must not keep an interval from the store
        log.exception("interval %d: its blocks have no names of files", opened.number)
    return None


def _behind(behind: Behind) -> dict[str, Any]:
    try:
        journal, durable = behind()
    except PgcdpError as error:
        log.info("no engine says what is durable behind the interval: %s", error)
        return {}
    return {"journal": journal, "settle_upto": durable}


def _index(opened: OpenInterval, boundary: Boundary, start: Start, more: dict[str, Any]) -> IndexFiles:
    place = opened.path
    state = place / WAL_STATE
    state.unlink(missing_ok=True)
    rewinds = rewinds_of(opened)
    tables = _tables_place(start.store, place)
    readout = start.read([place], rewinds, save_state=state, upto=boundary.write, tables=tables, **more)
    past = start.past_of(rewinds)
    _check_followed(readout, start, boundary)
    indexed = TransactionIndex(readout, past, read_look(place), boundary.next_xid)
    for event in indexed.events:
        if event["kind"] == "lost":
            lost = f"{format_lsn(event['lsn'])} to {format_lsn(event['end_lsn'])}"
            log.warning("interval %d: WAL %s was not seen whole: what ended there is not listed", opened.number, lost)
    write_json(place / EVENTS, {"events": indexed.events, "tables": indexed.tables})
    pending = {note.lsn for note in indexed.pending}
    notes = (*past.notes, *readout.notes)
    recent = [note for note in notes if note.lsn >= boundary.redo_lsn or note.lsn in pending]
    if readout.left_out:
        log.warning(
            "interval %d: of the records about names of relations %d were taken, and %d more not: names may be missing",
            opened.number, NOTES, readout.left_out,
        )  # fmt: skip
        recent = [note for note in recent if not of_database(note)]  # their pages lack what was left out
    write_file(place / CATALOG_NOTES, pack_notes(recent))
    files = [write_transactions(place, indexed.table), write_wal(place, indexed.wal)]
    files += [summary_of(place / name) for name in (EVENTS, CATALOG_NOTES, WAL_STATE)]
    if indexed.look is not None:
        files.append(write_look(place, indexed.look))
    return IndexFiles(tuple(files), summarize(indexed))


def _tables_place(store: Store, place: Path) -> Path:
    """Beside the interval, not in it: what a killed agent leaves must not be published; in no encrypted store."""
    if not store.encrypted:
        return place.with_suffix(".wal")
    notes = make_notes(store)
    if notes is None:
        raise PreconditionError(f"{notes_of(store)} cannot be written to", "run the agent as root")
    return notes / "wal"


def _check_followed(readout: Readout, start: Start, boundary: Boundary) -> None:
    """Raises PreconditionError when the record of the boundary's checkpoint was not read: the WAL was lost sight of.

    A checkpoint begins behind the one before, so that its record lies in the interval; but a standby's restartpoint
    names a record that it may have received before.
    """
    lsn, back = boundary.checkpoint_lsn, boundary.checkpoint_lsn <= start.boundary.checkpoint_lsn
    known = readout.notes if back else [*readout.notes, *start.past.notes]
    if any(note.lsn == lsn and is_checkpoint(note) for note in known):
        return
    if back:
        raise PreconditionError(
            f"the WAL went back from {format_lsn(start.boundary.checkpoint_lsn)} to {format_lsn(lsn)}, as when a copy "
            "of the data directory is put in its place",
            "its transactions are listed again from this boundary on",
        )
    raise PreconditionError(f"the record of its boundary's checkpoint, at {format_lsn(lsn)}, was not found in its WAL")


def summarize(indexed: TransactionIndex) -> dict[str, Any]:
    """What the manifest says of the transactions: whether to look for one here, without opening the index.

    `count` ended, `committed` of them with a commit.

    The highest and lowest xid are of 64 bits, those of subtransactions included.
    """
    table: pa.Table = indexed.table
    marks = sum(event["kind"] in ("mark", "restore_point") for event in indexed.events)
    lost = sum(event["kind"] == "lost" for event in indexed.events)
    said = {"marks": marks, "lost": lost, "wal_to": int(indexed.wal["to_lsn"].max(initial=0))}
    if not len(table):
        return {**said, "count": 0}
    ends = {name: table.column(name).to_numpy() for name in ("lsn", "xid", "time_us", "write")}
    subxids = table.column("subxids").combine_chunks().flatten().to_numpy()
    first = np.unique(ends["lsn"], return_index=True)[1]
    status = table.column("status").to_numpy()[first]
    ends["xid"] = np.append(ends["xid"], full_xid(subxids, indexed.next_xid))
    return {
        **said,
        "count": len(first),
        "committed": int(np.isin(status, (COMMITTED, COMMITTED_PREPARED)).sum()),
        **{f"{bound}_{name}": int(getattr(ends[name], bound)()) for name in ends for bound in ("min", "max")},
    }


def read_events(place: Path) -> dict[str, Any]:
    """`events` and `tables` of a published interval (FORMAT.md 3.7). Raises DamageError, also when it is missing."""
    try:
        return read_json(place / EVENTS)
    except FileNotFoundError:
        raise DamageError(f"{place / EVENTS} is missing (offset 0)", STILL) from None
