"""The settings of a volume set: one SETTINGS table, from which Config, SET.toml, its comments, docs and help derive.

A set SET has its settings in `/etc/pgcdp/SET.toml`, its state in `/var/lib/pgcdp/SET` and its sockets and mounts in
`/run/pgcdp/SET`, all below `PGCDP_ROOT` when that is set. The set exists exactly when its settings file does.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import tomlkit

from pgcdp import fsio
from pgcdp.errors import PreconditionError, UsageError
from pgcdp.metrics_address import parse_address
from pgcdp.units import parse_duration, parse_size

Effect = Literal["fixed", "up", "agent", "now"]
"""When a change takes effect: never (what protect decided), at the next `up`, when the agent starts, or at once."""

SET_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")
SOCKET_PATH_LIMIT = 107
"""Bytes that a Unix socket's path may have (sun_path less its NUL)."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One row of SETTINGS: `name` is the key in SET.toml ("cluster.port" lies in the table [cluster]).

    `default` is the value as text of the file, None when it must be given. `allowed` is told to users on an error.
    """

    name: str
    read: Callable[[Any], Any]
    write: Callable[[Any], Any]
    default: Any
    allowed: str
    help: str
    effect: Effect

    @property
    def section(self) -> str:
        """ "" for the top of the file, else the table."""
        return self.name.rpartition(".")[0]

    @property
    def key(self) -> str:
        """The key inside its section."""
        return self.name.rpartition(".")[2]


@dataclass(frozen=True, slots=True)
class VolumeConfig:
    """One volume of the set; its number in captured writes is its place in `Config.volumes`.

    `backing` is an image file or (`device`) a block device, `bytes` its size, a multiple of 4096.
    """

    name: str
    backing: Path
    device: bool
    fs: str
    mountpoint: Path
    bytes: int


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """What protect learnt of the cluster: `version` is the major number, `command_line` the postmaster's whole
    command line, `was_running` whether it ran before protect."""

    version: int
    bindir: Path
    owner: str
    port: int
    socket_directory: str
    command_line: tuple[str, ...]
    log_file: Path
    system_identifier: str
    was_running: bool


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
    def extend_state(self) -> Path:
        """The volume that the set is being given, and at which step that is."""
        return self.state / "extend.json"


@dataclass(frozen=True, slots=True)
class Config:
    """The settings of one set, as SETTINGS lists them."""

    name: str
    set_id: str
    pgdata: Path
    store: Path
    journal: Path
    volumes: tuple[VolumeConfig, ...]
    cluster: ClusterConfig
    journal_limit: int = 16 << 30
    segment_size: int = 64 << 20
    cut: tuple[str, ...] = ("checkpoint", "5min", "1G")
    apply: Literal["optimal", "replay"] = "optimal"
    on_full: Literal["stall"] = "stall"
    fs: Literal["ext4", "xfs"] = "ext4"
    compression_level: int = 1
    fence_after: float = 30.0
    keep_writes: float | None = None
    keep_boundaries: float | None = None
    keep_hourly: float | None = None
    keep_daily: float | None = None
    least_free: int = 0
    metrics_listen: str = "off"
    scrub_every: float | None = 7 * 86400.0
    scrub_rate: int = 32 << 20
    root: Path = field(default_factory=lambda: root_directory())

    @property
    def paths(self) -> SetPaths:
        return SetPaths(self.root, self.name)

    @property
    def set_id_bytes(self) -> bytes:
        """The 16 bytes that every file of the set carries."""
        return bytes.fromhex(self.set_id)


# --- reading and writing one value: each raises ValueError when it does not fit


def exact_size(count: int) -> str:
    """A size that `parse_size` reads back to the same number: "16G", "20481M", "4096"."""
    for suffix, step in (("T", 1 << 40), ("G", 1 << 30), ("M", 1 << 20), ("K", 1 << 10)):
        if count and count % step == 0:
            return f"{count // step}{suffix}"
    return str(count)


def exact_duration(seconds: float) -> str:
    """A duration that `parse_duration` reads back to the same number."""
    return f"{int(seconds) if seconds == int(seconds) else seconds}s"


def exact_period(seconds: float | None) -> str:
    """As `exact_duration`, whole days as days; None is "all"."""
    if seconds is None:
        return "all"
    return f"{int(seconds) // 86400}d" if seconds and seconds % 86400 == 0 else exact_duration(seconds)


def exact_often(seconds: float | None) -> str:
    """As `exact_period`; None is "never"."""
    return "never" if seconds is None else exact_period(seconds)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError
    return value


def _path(value: Any) -> Path:
    path = Path(_text(value))
    if not path.is_absolute():
        raise ValueError
    return path


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def _words(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError
    return tuple(_text(word) for word in value)


def _command_line(value: Any) -> tuple[str, ...]:
    words = _words(value)
    if not words or not words[0].startswith("/"):
        raise ValueError
    return words


def _number(low: int, high: int) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError
        return value

    return read


def _size(least: int, multiple: int = 4096) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        count = value if isinstance(value, int) and not isinstance(value, bool) else _parsed_size(_text(value))
        if count < least or count % multiple:
            raise ValueError
        return count

    return read


def _duration(value: Any) -> float:
    try:
        seconds = parse_duration(_text(value))
    except UsageError:
        raise ValueError from None
    if seconds < 1:
        raise ValueError
    return seconds


def _period(value: Any) -> float | None:
    """Seconds, None for "all"."""
    if value == "all":
        return None
    try:
        return parse_duration(_text(value))
    except UsageError:
        raise ValueError from None


def _often(value: Any) -> float | None:
    """Seconds, None for "never"."""
    return None if value == "never" else _duration(value)


def _parsed_size(text: str) -> int:
    try:
        return parse_size(text)
    except UsageError:
        raise ValueError from None


def _choice(*words: str) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        if value not in words:
            raise ValueError
        return str(value)

    return read


def _matching(pattern: str) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        if not re.fullmatch(pattern, _text(value)):
            raise ValueError
        return str(value)

    return read


def _address(value: Any) -> str:
    parse_address(_text(value))
    return str(value)


def _cut(value: Any) -> tuple[str, ...]:
    words = _words([value] if isinstance(value, str) else value)
    for word in words:
        if word in ("checkpoint", "rate") or word.startswith("rate:"):
            continue
        try:
            parse_duration(word)
        except UsageError:
            _parsed_size(word)
    if not words:
        raise ValueError
    return words


_SIZES = "a size such as 64M or 16G"
_ADDRESSES = '"off", "127.0.0.1:PORT", "[::1]:PORT", or an absolute path for a Unix socket'
_PATHS = "an absolute path"
_PERIODS = '"all", or a period such as 12h or 7d'

# fmt: off
SETTINGS: tuple[Setting, ...] = (
    Setting("set_id", _matching("[0-9a-f]{32}"), str, None, "32 hex digits",
            "identity of the volume set, in every file that belongs to it", "fixed"),
    Setting("pgdata", _path, str, None, _PATHS, "data directory of the cluster", "fixed"),
    Setting("store", _path, str, None, _PATHS, "where backup images and intervals are kept", "agent"),
    Setting("journal", _path, str, None, _PATHS, "where the journal of captured writes lies", "fixed"),
    Setting("journal_limit", _size(32 << 20), exact_size, "16G", "a size of at least 32M",
            "most bytes that the journal may take before on_full applies", "up"),
    Setting("segment_size", _size(8 << 20), exact_size, "64M", "a multiple of 4096 bytes, at least 8M",
            "size of a new journal segment", "up"),
    Setting("cut", _cut, list, ["checkpoint", "5min", "1G"], 'a list of "checkpoint", "rate", periods and sizes',
            "when an interval is closed: at Postgres's own checkpoints, after a period, after that many bytes",
            "agent"),
    Setting("apply", _choice("optimal", "replay"), str, "optimal", '"optimal" or "replay"',
            "how the image moves: each block once, or every write in order", "agent"),
    Setting("on_full", _choice("stall"), str, "stall", '"stall"',
            "what happens when the journal cannot grow: writes wait", "up"),
    Setting("fs", _choice("ext4", "xfs"), str, "ext4", '"ext4" or "xfs"', "filesystem of the volumes", "fixed"),
    Setting(
        "compression_level", _number(1, 19), int, 1, "a number from 1 to 19", "zstd level of what is stored", "agent"
    ),
    Setting("fence_after", _duration, exact_duration, "30s", "a period of at least 1s, such as 30s or 2min",
            "how long an open view may take to learn that the image moves; then it is fenced: reading it is an error",
            "agent"),
    Setting("keep_writes", _period, exact_period, "all", _PERIODS,
            "how far back, from the newest boundary, any single write can be restored", "now"),
    Setting("keep_boundaries", _period, exact_period, "all", _PERIODS,
            "how far back every boundary can be restored", "now"),
    Setting("keep_hourly", _period, exact_period, "all", _PERIODS,
            "how far back the newest boundary of each hour (UTC) can be restored", "now"),
    Setting("keep_daily", _period, exact_period, "all", _PERIODS,
            "how far back the newest boundary of each day (UTC) can be restored; nothing before that is kept", "now"),
    Setting("least_free", _size(0, 1), exact_size, "0", "a size such as 20G, or 0",
            "bytes that shall be free where the store is: below that the oldest goes before its time", "now"),
    Setting("metrics_listen", _address, str, "off", _ADDRESSES,
            "where the agent serves metrics for Prometheus; whoever gets there may read them", "agent"),
    Setting("scrub_every", _often, exact_often, "7d", '"never", or a period of at least 1s such as 7d',
            "how often the agent reads all of the store and checks every checksum, in the background", "now"),
    Setting("scrub_rate", _size(0, 1), exact_size, "32M", "a size such as 32M, or 0 for as fast as it goes",
            "bytes a second that such a scrub, and check --full, read at most", "now"),
    Setting(
        "cluster.version", _number(13, 99), int, None, "a major version from 13", "major version of Postgres", "fixed"
    ),
    Setting("cluster.bindir", _path, str, None, _PATHS, "directory of its programs", "up"),
    Setting("cluster.owner", _text, str, None, "a user name", "operating system user that runs it", "up"),
    Setting("cluster.port", _number(1, 65535), int, None, "a number from 1 to 65535", "its port", "up"),
    Setting("cluster.socket_directory", _text, str, None, "a path, or an empty text for none",
            "directory of its Unix socket", "up"),
    Setting("cluster.command_line", _command_line, list, None, "a list of texts that begins with an absolute path",
            "command line that Postgres is started with", "up"),
    Setting("cluster.log_file", _path, str, None, _PATHS, "where the output of postgres goes", "up"),
    Setting("cluster.system_identifier", _matching("[0-9]{1,20}"), str, None, "a text of digits",
            "system identifier of the cluster, as text since it has 64 bits", "fixed"),
    Setting("cluster.was_running", _flag, bool, True, "true or false", "whether it ran before protect", "fixed"),
    Setting("volumes.name", _matching("[a-z0-9][a-z0-9_-]{0,31}"), str, None, "up to 32 of a-z, 0-9, _ and -",
            "name of the volume", "fixed"),
    Setting("volumes.backing", _path, str, None, _PATHS, "image file or block device under it", "fixed"),
    Setting("volumes.device", _flag, bool, False, "true or false", "whether the backing is a block device", "fixed"),
    Setting("volumes.fs", _choice("ext4", "xfs"), str, None, '"ext4" or "xfs"', "its filesystem", "fixed"),
    Setting("volumes.mountpoint", _path, str, None, _PATHS, "where it is mounted", "fixed"),
    Setting("volumes.bytes", _size(4096), exact_size, None, _SIZES, "its size", "fixed"),
)
"""Every setting, in the order of the file."""
# fmt: on

EFFECTS: dict[Effect, str] = {
    "fixed": "set by protect, do not change",
    "up": "takes effect at the next up",
    "agent": "takes effect when the agent starts",
    "now": "takes effect at once",
}


def setting(name: str) -> Setting:
    """The row of SETTINGS with that name; KeyError when there is none."""
    for row in SETTINGS:
        if row.name == name:
            return row
    raise KeyError(name)


# --- places


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


def set_of_pgdata(pgdata: Path) -> str | None:
    """The set that protects this data directory, or None. Unreadable settings of other sets are passed over."""
    wanted = pgdata.resolve()
    for name in list_sets():
        try:
            if load_config(name).pgdata.resolve() == wanted:
                return name
        except UsageError:
            continue
    return None


# --- the file


def load_config(name: str) -> Config:
    """Settings of a set.

    Raises UsageError naming file, key and what is allowed, PreconditionError for an unknown set.
    """
    paths = set_paths(name)
    file = paths.config_file
    try:
        text = file.read_text("utf-8")
    except FileNotFoundError:
        known = ", ".join(list_sets()) or "none"
        raise PreconditionError(
            f'there is no volume set "{name}" (no {file})', f"sets that exist: {known}; pgcdp protect makes one"
        ) from None
    except OSError as error:
        raise PreconditionError(f"cannot read {file}: {error.strerror}", "run pgcdp as root") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{file}: not UTF-8 at byte {error.start}", f"correct {file}") from None
    return parse_config(text, name, file, paths.root)


def parse_config(text: str, name: str, file: Path, root: Path) -> Config:
    """Config of the text of SET.toml; `file` is for messages. Raises UsageError."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{file}: {error}", f"correct {file}") from None
    volumes = document.pop("volumes", [])
    cluster = document.pop("cluster", {})
    if not isinstance(volumes, list) or not volumes or not all(isinstance(volume, dict) for volume in volumes):
        raise UsageError(f"{file}: volumes must be one or more tables", "write each volume as [[volumes]]")
    if not isinstance(cluster, dict):
        raise UsageError(f"{file}: cluster must be a table", "write it as [cluster]")
    top = _read_section("", document, file, "")
    facts = _read_section("cluster", cluster, file, "cluster.")
    rows = [_read_section("volumes", row, file, f"volumes[{number}].") for number, row in enumerate(volumes)]
    config = Config(
        name=name,
        root=root,
        volumes=tuple(VolumeConfig(**row) for row in rows),
        cluster=ClusterConfig(**facts),
        **top,
    )
    if config.journal_limit < 4 * config.segment_size:
        raise UsageError(
            f"{file}: journal_limit {exact_size(config.journal_limit)} is less than four times segment_size "
            f"{exact_size(config.segment_size)}",
            "raise journal_limit or lower segment_size",
        )
    return config


def _read_section(section: str, table: Mapping[str, Any], file: Path, prefix: str) -> dict[str, Any]:
    rows = {row.key: row for row in SETTINGS if row.section == section}
    for key in table:
        if key not in rows:
            raise UsageError(f"{file}: {prefix}{key} is not a setting", f"allowed here: {', '.join(rows)}")
    values: dict[str, Any] = {}
    for key, row in rows.items():
        value = table.get(key, row.default)
        if value is None:
            raise UsageError(f"{file}: {prefix}{key} is missing", f"{prefix}{key} is {row.help}: {row.allowed}")
        try:
            values[key] = row.read(value)
        except ValueError:
            raise UsageError(f"{file}: {prefix}{key} is {value!r}", f"{prefix}{key} must be {row.allowed}") from None
    return values


def check_value(name: str, value: Any) -> Any:
    """`value` as the setting's type (what CLI options are read with). Raises UsageError."""
    row = setting(name)
    try:
        return row.read(value)
    except ValueError:
        option = "--" + row.key.replace("_", "-")
        raise UsageError(f"{option} is {value!r}", f"{option} must be {row.allowed}") from None


def render_config(config: Config) -> str:
    """Text of SET.toml, each setting under a comment with its help."""
    document = tomlkit.document()
    document.add(tomlkit.comment(f'pgcdp: settings of the volume set "{config.name}"'))
    for row in SETTINGS:
        if row.section == "":
            _add(document, row, getattr(config, row.key))
    facts = tomlkit.table()
    for row in SETTINGS:
        if row.section == "cluster":
            _add(facts, row, getattr(config.cluster, row.key))
    document.add("cluster", facts)
    volumes = tomlkit.aot()
    for volume in config.volumes:
        table = tomlkit.table()
        for row in SETTINGS:
            if row.section == "volumes":
                _add(table, row, getattr(volume, row.key))
        volumes.append(table)
    document.add("volumes", volumes)
    return tomlkit.dumps(document)


def _add(table: Any, row: Setting, value: Any) -> None:
    table.add(tomlkit.nl())
    table.add(tomlkit.comment(f"{row.help} ({EFFECTS[row.effect]})"))
    table.add(row.key, row.write(value))


def save_config(config: Config) -> None:
    """Publish SET.toml atomically and durably, 0600."""
    file = config.paths.config_file
    file.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    fsio.write_atomic(file, render_config(config).encode())


def remove_config(config: Config) -> None:
    """The set exists no longer. Harmless when the file is gone."""
    file = config.paths.config_file
    if file.exists():
        file.unlink()
        fsio.sync_directory(file.parent)


def documentation() -> list[tuple[str, str, str, str]]:
    """(name, default, help, when it takes effect) of each setting, for docs and help."""
    return [
        (row.name, "" if row.default is None else str(row.default), row.help, EFFECTS[row.effect]) for row in SETTINGS
    ]


def fields_match() -> bool:
    """Whether the dataclasses have exactly the settings of the table (a test asks)."""
    top = {item.name for item in fields(Config)} - {"name", "root", "volumes", "cluster"}
    facts = {item.name for item in fields(ClusterConfig)}
    rows = {item.name for item in fields(VolumeConfig)}
    return (
        top == {row.key for row in SETTINGS if row.section == ""}
        and facts == {row.key for row in SETTINGS if row.section == "cluster"}
        and rows == {row.key for row in SETTINGS if row.section == "volumes"}
    )
