"""What all tests share: the fixture files, and that nothing is left when the last test has ended."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests import data_directory, variants
from tests.leaks import SESSION_VARIABLE, Watch
from tests.scratch import keep_apart

pytest_plugins = [f"tests.{file.stem}" for file in sorted(Path(__file__).parent.glob("fix_*.py"))]

# Every process that a test starts inherits this, and is known by it even when it has become a daemon.
os.environ[SESSION_VARIABLE] = secrets.token_hex(8)
# The sets of this machine are not the tests' business. A test that makes one has a root of its own.
os.environ.pop("PGCDP_ROOT", None)

# Time is shared with whatever else runs; pytest-timeout ends what hangs.
settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")

_watch = Watch(os.environ[SESSION_VARIABLE])


@pytest.fixture(scope="session", autouse=True)
def _own_notes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Catalogs of stores that belong to no set are made here."""
    os.environ["PGCDP_ROOT"] = str(tmp_path_factory.mktemp("root"))
    yield
    os.environ.pop("PGCDP_ROOT")


@pytest.fixture(scope="session", autouse=True)
def _nothing_left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """An error at the very end when a process, mount, loop device or scratch directory of a test outlives it."""
    keep_apart(tmp_path_factory.getbasetemp())
    yield
    data_directory.remove_copied()
    left = _watch.left(others={tmp_path_factory.getbasetemp()})
    assert not left, "left behind:\n" + "\n".join(left)


def pytest_addoption(parser: pytest.Parser) -> None:
    """`script/test` without arguments gives this."""
    parser.addoption("--one-variant", action="store_true", help="of tests that are run on several versions, one")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The house first: a file in the wrong room explains other failures."""
    if config.getoption("--one-variant"):
        items[:], out = variants.split(items)
        config.hook.pytest_deselected(items=out)
    items.sort(key=lambda item: Path(item.path).parent != Path(__file__).parent)
