"""The volume sets of this machine: which there are, and where everything of one lies.

A set SET has its settings in `/etc/pgcdp/SET.toml`, its state in `/var/lib/pgcdp/SET` and its sockets and mounts in
`/run/pgcdp/SET`, all below `PGCDP_ROOT` when that is set. The set exists exactly when its settings file does.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pgcdp.errors import UsageError

SET_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")
SOCKET_PATH_LIMIT = 107
"""Bytes that a Unix socket's path may have (sun_path less its NUL)."""


@dataclass(frozen=True, slots=True)
class SetPaths:
    """Where everything of a set lies (pure: touches nothing)."""

    root: Path
    name: str

    @property
    def config_file(self) -> Path:
        return self.root / "etc/pgcdp" / f"{self.name}.toml"

    @property
    def state(self) -> Path:
        """State directory, 0700: images of volumes, journal (unless set elsewhere), logs, protect's own journal."""
        return self.root / "var/lib/pgcdp" / self.name

    @property
    def run(self) -> Path:
        """Runtime directory, 0700: sockets and the FUSE mount."""
        return self.root / "run/pgcdp" / self.name

    @property
    def journal(self) -> Path:
        """Where the journal lies unless the setting says otherwise."""
        return self.state / "journal"

    @property
    def volumes(self) -> Path:
        """Where image files of volumes lie."""
        return self.state / "volumes"

    @property
    def fuse(self) -> Path:
        return self.run / "fuse"

    @property
    def control(self) -> Path:
        """Control socket of the engine."""
        return self.run / "engine.sock"

    @property
    def agent_socket(self) -> Path:
        return self.run / "agent.sock"

    @property
    def agent_lock(self) -> Path:
        """flock'ed by the agent as long as it lives."""
        return self.run / "agent.lock"

    @property
    def lock(self) -> Path:
        """flock'ed by protect, unprotect, up and down: one at a time for a set."""
        return self.root / "run/pgcdp" / f"{self.name}.lock"

    @property
    def engine_log(self) -> Path:
        return self.state / "engine.log"

    @property
    def agent_log(self) -> Path:
        return self.state / "agent.log"

    @property
    def protect_state(self) -> Path:
        """The step that protect or unprotect is at, so that a killed one can be finished or put back."""
        return self.state / "protect.json"

    @property
    def rewind_state(self) -> Path:
        """What a rewind in place is at; as long as it is there nothing is mounted or started by anything else."""
        return self.state / "rewind.json"

    @property
    def heal_state(self) -> Path:
        """Since when writes are missing that are being taken in; nothing is mounted as long as it is there."""
        return self.state / "heal.json"

    @property
    def remake_state(self) -> Path:
        """Which volumes are being written anew; nothing is captured or mounted as long as it is there."""
        return self.state / "remake.json"

    @property
    def extend_state(self) -> Path:
        """The volume that the set is being given, and at which step that is."""
        return self.state / "extend.json"


def root_directory(env: Mapping[str, str] | None = None) -> Path:
    """`PGCDP_ROOT`, or `/`. Raises UsageError when it is not absolute."""
    root = Path((os.environ if env is None else env).get("PGCDP_ROOT") or "/")
    if not root.is_absolute():
        raise UsageError(f'PGCDP_ROOT is "{root}", which is not absolute', "give PGCDP_ROOT as an absolute path")
    return Path(os.path.realpath(root))


def set_paths(name: str) -> SetPaths:
    """Paths of the set. Raises UsageError for a name that cannot be one, or a root too deep for a socket."""
    if not SET_NAME.fullmatch(name):
        raise UsageError(f'"{name}" is not a set name', "use up to 32 of a-z, 0-9, _ and -, such as main")
    paths = SetPaths(root_directory(), name)
    if len(os.fsencode(paths.agent_socket)) > SOCKET_PATH_LIMIT - 8:
        raise UsageError(
            f"PGCDP_ROOT {paths.root} is too deep: sockets below it would have paths over {SOCKET_PATH_LIMIT} bytes",
            "set PGCDP_ROOT to a directory with a shorter path",
        )
    return paths


def list_sets() -> list[str]:
    """Names of all sets, sorted."""
    directory = SetPaths(root_directory(), "x").config_file.parent
    if not directory.is_dir():
        return []
    return sorted(file.stem for file in directory.glob("*.toml") if SET_NAME.fullmatch(file.stem))


def only_set() -> str:
    """The set that is meant when none is named. Raises UsageError when there is none or more than one."""
    names = list_sets()
    if not names:
        raise UsageError("no volume set is configured", "make one with pgcdp protect SET --pgdata DIR --store DIR")
    if len(names) > 1:
        raise UsageError(f"there are {len(names)} volume sets: {', '.join(names)}", "name one of them")
    return names[0]
