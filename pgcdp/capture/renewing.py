"""A journal that cannot be read to its end any more, and how it goes on: behind what the store has.

Its files were removed while the set ran, or their disk has lost them. Where the set was stopped in order the volumes
are whole all the same. What lies between the store and them is in no file any more; `healing` takes in what they have,
as a gap. Write numbers go on behind those of the store, where nobody has seen the ones that are lost.
"""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from pgcdp import fsio
from pgcdp.capture import same_parts, tracked
from pgcdp.capture.control import EngineStatus
from pgcdp.capture.journal import AppliedMark, Journal, Tracking, write_mark
from pgcdp.capture.segment import Segment
from pgcdp.config import Config
from pgcdp.errors import DamageError, PreconditionError
from pgcdp.records import Position

ASIDE = "lost-"
"""Directories in the journal with segments that were set aside: nobody reads them."""


def unreadable(config: Config) -> str | None:
    """What is wrong with the journal of a set that is stopped; None when capture can start on it, and all be stored."""
    journal = Journal(config.journal, config.set_id_bytes)
    try:
        mark = journal.applied_mark()
        segments = journal.segments()
        if mark is None or (not segments and mark.durable_write <= min(mark.applied_write, mark.released_write)):
            return None
        for sequence, following in pairwise(segments):
            if following != sequence + 1:
                return f"{journal.path(sequence + 1)} is missing"
        for sequence in segments:
            if problem := _wrong_size(journal, sequence):
                return problem
        # Its last batch counts in any case: the writer goes on behind it.
        journal.last_write(min(mark.applied_write, mark.released_write, max(0, mark.durable_write - 1)))
    except DamageError as damage:
        return damage.message
    except OSError as error:
        return fsio.told(error)
    return None


def _wrong_size(journal: Journal, sequence: int) -> str | None:
    """Raises DamageError when its header is not what was written."""
    segment = Segment(journal.path(sequence), sequence, journal.set_id, journal.peeking)
    size = os.fstat(segment.fd).st_size
    segment.close()
    return None if size == segment.size else f"{segment.path} ends at offset {size}, not at {segment.size}"


def mark_again(config: Config, stood: EngineStatus, synced: int) -> None:
    """Write the applied mark of a set that was stopped in order, where the file was removed while it ran.

    `stood`: what capture said last, with nothing mounted any more; `synced`: the last write that it had on the volumes.
    """
    if synced == stood.durable_write and not (config.journal / "applied").exists():
        same_parts.forget(config.paths)
        was = stood.tracked
        told = None if was is None else Tracking(tracked.TRACKING, was.since_ns, synced, 0)
        mark = AppliedMark(0, True, synced, stood.released_write, synced, int(stood.raw["batch"]), stood.position, told)
        write_mark(config.journal, config.set_id_bytes, mark)
        same_parts.renew(config)  # older ones have marks of higher numbers


def refuse_older(config: Config, ended: int, held: int, hint: str) -> None:
    """Raises PreconditionError when the journal ends before the store: new writes would pass for those it has."""
    if held > ended:
        raise PreconditionError(
            f"the journal {config.journal} ended with write {ended}, and the store has write {held}: it is an older "
            "copy",
            hint,
        )


def begin_anew(config: Config, behind: int) -> Path | None:
    """Have the journal of a stopped set hold nothing, and go on behind write `behind`, durably.

    Its segments are set aside, for whoever wants to look at them; returns where, None when there were none. Harmless
    when done again, as long as capture was not started since. The set must have been stopped in order.
    """
    journal = Journal(config.journal, config.set_id_bytes)
    mark = journal.applied_mark()
    if mark is None or not mark.clean:
        raise DamageError(f"{config.journal / 'applied'} does not say that the set was stopped in order (offset 0)")
    same_parts.forget(config.paths)  # a kill on the way leaves none that is asked for
    aside = config.journal / f"{ASIDE}{behind + 1:020d}"
    there = journal.segments()
    newest = max([mark.position.segment, *there])
    if there:
        fsio.make_directory(aside)
        # First the number that comes next, or a kill on the way would have it given out once more.
        mark = replace(mark, sequence=mark.sequence + 1, position=Position(newest, mark.position.offset))
        write_mark(config.journal, config.set_id_bytes, mark)
        for sequence in there:
            os.rename(journal.path(sequence), aside / journal.path(sequence).name)
        fsio.sync_directory(aside)
        fsio.sync_directory(config.journal)
    # What was tracked speaks of another order of writes; whoever begins anew compares all blocks.
    (config.journal / tracked.NAME).unlink(missing_ok=True)
    mark = replace(
        mark, sequence=mark.sequence + 1, applied_write=behind, released_write=behind, durable_write=behind,
        tracking=None,
    )  # fmt: skip
    write_mark(config.journal, config.set_id_bytes, mark)
    same_parts.renew(config)
    return aside if aside.is_dir() else None
