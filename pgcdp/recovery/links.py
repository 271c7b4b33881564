"""The links of a restored data directory that Postgres follows: pg_wal, tablespaces, and what somebody moved by hand.

They bear production's paths. Followed as they are, whatever runs on the copy reads and writes production's own files.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from pgcdp.errors import PreconditionError
from pgcdp.postgres.cluster import FOLLOWED


def own_places(
    pgdata: Path, elsewhere: Mapping[Path, Path], *, below: Path | None = None, besides: Path | None = None
) -> dict[Path, Path]:
    """Each link that leads out of a restored data directory, and where it shall lead: {link: place}.

    `elsewhere`: where production's directories are in the copy, {production's: its own}; the data directory's own may
    be among them. Links that lead to a place inside already are not told. `below`, `besides`: only those in that
    directory, or not those in it. Raises PreconditionError, with nothing changed, for one that leads to what was not
    restored.
    """
    root = Path(os.path.realpath(pgdata))
    was = next((place for place, own in elsewhere.items() if Path(os.path.realpath(own)) == root), root)
    found: dict[Path, Path] = {}
    for link in symbolic_links(below or pgdata, besides):
        name = link.relative_to(pgdata)
        named = Path(os.path.normpath((was / name).parent / os.readlink(link)))
        place = _own(named, elsewhere)
        if place is not None:
            found[link] = place
        elif not Path(os.path.realpath(link)).is_relative_to(root) and FOLLOWED.fullmatch(name.parts[0]):
            raise PreconditionError(
                f"{link} leads to {os.readlink(link)}, which is not part of what was restored",
                "that data lies outside of the protected volumes; see pgcdp check",
            )
    return found


def lead_inside(trees: Mapping[Path, Path], elsewhere: Mapping[Path, Path]) -> None:
    """Lead the links in `trees`, {a part of a restored cluster: where it is copied to}, to what they led to there.

    The first tree is the data directory. For what somebody moved by hand: the links to tablespaces are left as they
    are, pg_wal is none any more. A relative link that stays in its tree is right already. Raises PreconditionError,
    with nothing changed, for one that Postgres would follow to what is not copied: production's own.
    """
    change: dict[Path, Path] = {}
    pgdata = next(iter(trees))
    for tree in trees:
        for link in symbolic_links(tree):
            if tree == pgdata and link.parent.name == "pg_tblspc":
                continue
            named = _named(link, elsewhere)
            own = _own(named, elsewhere)
            if own is None and tree == pgdata:
                continue  # `own_places` has judged it
            target = None if own is None else _own(own, trees)
            if own is None or target is None:
                raise PreconditionError(
                    f"{link} leads to {named}, which is production's own and no part of what is restored",
                    "put what it leads to in its place, or restore with --to-image",
                )
            if os.path.isabs(os.readlink(link)) or not own.is_relative_to(tree):
                change[link] = target
    for link, target in change.items():
        status = link.lstat()
        link.unlink()
        link.symlink_to(target)
        os.chown(link, status.st_uid, status.st_gid, follow_symlinks=False)


def _named(link: Path, elsewhere: Mapping[Path, Path]) -> Path:
    """Where a link of the copy leads in production, which has the same directories in other places."""
    at = link.parent
    was = {own: place for place, own in elsewhere.items()}
    return Path(os.path.normpath((_own(at, was) or at) / os.readlink(link)))


def _own(named: Path, elsewhere: Mapping[Path, Path]) -> Path | None:
    holding = [place for place in elsewhere if named.is_relative_to(place)]
    if not holding:
        return None
    place = max(holding, key=lambda each: len(each.parts))
    return elsewhere[place] / named.relative_to(place)


def symbolic_links(directory: Path, besides: Path | None = None) -> list[Path]:
    """All of them below a directory, but for those in `besides`; none is followed.

    A directory that goes meanwhile has none: recovery may be removing that of a database which was dropped.
    """
    found = []
    with suppress(FileNotFoundError), os.scandir(directory) as entries:
        for entry in entries:
            if entry.is_symlink():
                found.append(Path(entry.path))
            elif entry.is_dir(follow_symlinks=False) and Path(entry.path) != besides:
                found += symbolic_links(Path(entry.path), besides)
    return found
