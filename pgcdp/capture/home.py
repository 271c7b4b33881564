"""Where a set is at home: written beside its journal, so that a copy of its settings does not attach its volumes.

Whoever copies the state root, or the whole machine, has settings that name the same journal, volumes and store. Two
that capture into them would each falsify what the other one stores.
"""

from __future__ import annotations

from pgcdp import fsio
from pgcdp.config import Config
from pgcdp.errors import DamageError, PreconditionError
from pgcdp.machine import Place

FILE = "home.json"


def refuse_elsewhere(config: Config) -> None:
    """Raises PreconditionError when the journal is at home on another machine, or below another root."""
    home, here = _home(config), Place.here(config.root)
    if home is not None and not home.is_same(here):
        raise PreconditionError(
            f"the journal {config.journal} is that of set {config.name} on {home}, and this is {here}: a copy of it, "
            "perhaps, while that one still runs",
            f"if that one is gone for good: pgcdp up {config.name} --take-over",
        )


def is_here(config: Config) -> bool:
    """Whether the journal says that this is its home: not, when it says nothing."""
    home = _home(config)
    return home is not None and home.is_same(Place.here(config.root))


def settle(config: Config) -> None:
    """The set is at home here from now on, durably, unless it is anywhere already."""
    if _home(config) is None:
        move(config)


def move(config: Config) -> None:
    """The set is at home here from now on, durably, wherever it was."""
    fsio.write_json(config.journal / FILE, Place.here(config.root).as_json())


def _home(config: Config) -> Place | None:
    try:
        return Place.of(fsio.read_json(config.journal / FILE))
    except (FileNotFoundError, DamageError, KeyError, TypeError):  # what is lost is written anew
        return None
