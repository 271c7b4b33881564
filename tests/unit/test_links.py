"""Links of a restored data directory: what somebody moved by hand stays in the copy, or is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pgcdp.errors import PreconditionError
from pgcdp.recovery.links import lead_inside

PRODUCTION = {"data": Path("/production/data"), "wal": Path("/production/wal"), "space": Path("/production/space")}


@pytest.fixture
def copy(tmp_path: Path) -> dict[str, Path]:
    """Where the parts of a restored cluster are mounted."""
    found = {name: tmp_path / f"mnt-{name}" for name in PRODUCTION}
    for place in found.values():
        (place / "sub").mkdir(parents=True)
        (place / "sub" / "file").touch()
    return found


def lead(copy: dict[str, Path], *left_out: str) -> None:
    elsewhere = {place: copy[name] for name, place in PRODUCTION.items()}
    places = {"data": Path("/restored"), "wal": Path("/restored/pg_wal"), "space": Path("/restored.tablespaces/1")}
    lead_inside({copy[name]: place for name, place in places.items() if name not in left_out}, elsewhere)


@pytest.mark.parametrize(
    ("tree", "target", "wanted"),
    [
        ("data", "/production/data/sub/file", "/restored/sub/file"),
        ("data", "sub/file", "sub/file"),
        ("data", "/production/wal/sub", "/restored/pg_wal/sub"),
        ("data", "../wal/sub", "/restored/pg_wal/sub"),
        ("data", "/var/log/postgresql", "/var/log/postgresql"),
        ("space", "/production/data/sub", "/restored/sub"),
        ("space", "/production/space/sub", "/restored.tablespaces/1/sub"),
    ],
)
def test_it_leads_to_the_copy(copy: dict[str, Path], tree: str, target: str, wanted: str) -> None:
    link = copy[tree] / "link"
    link.symlink_to(target)
    lead(copy)
    assert os.readlink(link) == wanted


@pytest.mark.parametrize(
    ("tree", "target"), [("data", "/production/space/sub"), ("wal", "/another/disk"), ("wal", "../space/sub")]
)
def test_production_is_refused_and_nothing_changed(copy: dict[str, Path], tree: str, target: str) -> None:
    """The tablespace is no part of this copy, and what is on no volume was captured by nobody."""
    first, second = copy["data"] / "a", copy[tree] / "b"
    first.symlink_to("/production/data/sub")
    second.symlink_to(target)
    with pytest.raises(PreconditionError, match="production's own") as caught:
        lead(copy, "space")
    assert caught.value.hint
    assert (os.readlink(first), os.readlink(second)) == ("/production/data/sub", target)
