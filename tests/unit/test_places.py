"""Scratch places: nobody else's directory is used, and several users of one do not take each other's away."""

from __future__ import annotations

import os
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Barrier

import pytest

from pgcdp.errors import PreconditionError
from pgcdp.recovery import places
from tests.waiting import pass_time


def test_a_directory_that_somebody_else_made_is_refused(tmp_path: Path) -> None:
    below = tmp_path / "place"
    below.mkdir(mode=0o711)
    os.chown(below, 65534, 65534)
    with (
        pytest.raises(PreconditionError, match=f"{below} belongs to user id 65534, not to 0"),
        places.place_below(below),
    ):
        pass
    os.chown(below, 0, 0)
    for mode in (0o777, 0o1777, 0o720):
        below.chmod(mode)
        with pytest.raises(PreconditionError, match="can be written by others"), places.place_below(below):
            pass
    elsewhere = tmp_path / "elsewhere"
    below.rename(elsewhere)
    elsewhere.chmod(0o711)
    below.symlink_to(elsewhere)
    with pytest.raises(PreconditionError, match="is not a directory"), places.place_below(below):
        pass
    assert list(elsewhere.iterdir()) == []
    below.unlink()
    below.write_text("a file")
    with pytest.raises(PreconditionError, match="is not a directory"), places.place_below(below):
        pass


def test_a_place_is_ours_alone_and_goes(tmp_path: Path) -> None:
    below = tmp_path / "place"
    left = below / "point-left"
    left.mkdir(parents=True)
    (left / "data.img").write_text("x")
    below.chmod(0o711)
    with places.place_below(below) as mine, places.place_below(below) as other:
        assert mine != other
        assert not left.exists(), "what a killed process left goes"
        assert mine.is_dir()
        assert stat.S_IMODE(mine.stat().st_mode) == 0o711
    assert not below.exists()


def test_an_error_inside_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with places.place_below(tmp_path / "place") as mine:
            (mine / "file").write_text("x")
            raise PreconditionError("inside")

    with pytest.raises(PreconditionError, match="inside"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_many_at_once(tmp_path: Path) -> None:
    """Each comes and goes hundreds of times; none may lose its place, or fail."""
    below = tmp_path / "place"
    together = Barrier(6)

    def user(number: int) -> int:
        together.wait()
        for _ in range(150):
            with places.place_below(below) as mine:
                (mine / "file").write_text(str(number))
                assert (mine / "file").read_text() == str(number)
        return number

    with ThreadPoolExecutor(6) as pool:
        assert sorted(pool.map(user, range(6))) == list(range(6))
    assert not below.exists()


def test_what_an_agent_leaves_in_a_place_that_is_removed_goes_too(tmp_path: Path) -> None:
    """It gives the view in it another map just then, and takes that away again when nobody answers."""
    for _ in range(30):
        place = tmp_path / "point-x"
        (place / "below").mkdir(parents=True)
        for number in range(50):
            (place / "below" / f"{number}").touch()
        begun = threading.Event()

        def agent(place: Path = place, begun: threading.Event = begun) -> None:
            with suppress(FileNotFoundError):
                for number in range(100_000):
                    file = place / f"map-{number}"
                    file.touch(exist_ok=False)
                    begun.set()
                    if number % 2:
                        file.unlink(missing_ok=True)
                    pass_time(0.0002)

        writer = threading.Thread(target=agent)
        writer.start()
        begun.wait()
        places.remove(place)
        writer.join()
        assert not place.exists()
