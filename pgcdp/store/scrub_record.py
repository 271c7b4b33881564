"""How far a store was scrubbed, and what was found: on this machine, in the notes on the store (`store.notes`).

A scrub goes on where it was killed. A part that is damaged stays recorded until it is read again and is whole.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pgcdp.errors import DamageError
from pgcdp.fsio import read_json, write_json
from pgcdp.store.damage import Damage
from pgcdp.store.layout import Store
from pgcdp.store.notes import make_notes, notes_of

FILE_NAME = "scrub.json"
LOCK_NAME = "scrub.lock"

By = Literal["check", "agent"]


@dataclass(frozen=True, slots=True)
class Record:
    """One pass over a store, the newest one. Times are ns since 1970, 0 for never.

    `began`, `ended`: of this pass; `whole`: when the last one began that was read to its end, so that every part was
    read since. `interval`: the last one that was read; `volume`, `block`: where the image is read on. `bytes`: read in
    this pass; `total`: what there was to read. `damages`: of parts that were not whole when they were read last.
    """

    by: By = "check"
    began: int = 0
    ended: int = 0
    whole: int = 0
    interval: int = 0
    volume: int = 0
    block: int = 0
    bytes: int = 0
    total: int = 0
    damages: tuple[Damage, ...] = field(default=())

    @property
    def under_way(self) -> bool:
        """Whether a pass was begun and not read to its end."""
        return self.began > self.ended

    def with_part(self, part: str, damages: list[Damage]) -> Record:
        """The same when a part has been read: what was known of it does not count any more."""
        kept = tuple(each for each in self.damages if each.part != part)
        return replace(self, damages=(*kept, *(replace(each, part=part) for each in damages)))


def read_record(store: Store) -> Record:
    """What was written last; an empty one when nothing was, or that cannot be read: it is made anew then."""
    try:
        content = read_json(notes_of(store) / FILE_NAME)
        damages = tuple(_damage(each) for each in content.pop("damages"))
        return Record(**content, damages=damages)
    except (OSError, DamageError, TypeError, KeyError, ValueError):
        return Record()


def write_record(store: Store, record: Record) -> None:
    """Keep it, durably. Where this user may not write, it is not kept."""
    place = make_notes(store)
    if place is None:
        return
    content: dict[str, Any] = asdict(record)
    content["damages"] = [{**asdict(each), "file": str(each.file)} for each in record.damages]
    write_json(place / FILE_NAME, content)


def _damage(content: dict[str, Any]) -> Damage:
    lost = content["lost"]
    found = None if lost is None else (int(lost[0]), None if lost[1] is None else int(lost[1]))
    return Damage(
        Path(content["file"]), content["offset"], content["message"], content["still"], found, content["part"]
    )
