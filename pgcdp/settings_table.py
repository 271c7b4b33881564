"""The SETTINGS table: every setting of a set, from which Config, SET.toml, its comments, docs and help derive."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from pgcdp import setting_values as values
from pgcdp.errors import UsageError
from pgcdp.units import exact_duration, exact_size

Effect = Literal["fixed", "up", "agent", "now"]
"""When a change takes effect: never (what protect decided), at the next `up`, when the agent starts, or at once."""


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


_SIZES = "a size such as 64M or 16G"
_ADDRESSES = '"off", "127.0.0.1:PORT", "[::1]:PORT", or an absolute path for a Unix socket'
_PATHS = "an absolute path"
_PERIODS = '"all", or a period such as 12h or 7d'

# fmt: off
SETTINGS: tuple[Setting, ...] = (
    Setting("set_id", values.matching("[0-9a-f]{32}"), str, None, "32 hex digits",
            "identity of the volume set, in every file that belongs to it", "fixed"),
    Setting("pgdata", values.path, str, None, _PATHS, "data directory of the cluster", "fixed"),
    Setting("store", values.path, str, None, _PATHS, "where backup images and intervals are kept", "agent"),
    Setting("journal", values.path, str, None, _PATHS, "where the journal of captured writes lies", "fixed"),
    Setting("journal_limit", values.size(32 << 20), exact_size, "16G", "a size of at least 32M",
            "most bytes that the journal may take before on_full applies", "up"),
    Setting("segment_size", values.size(8 << 20), exact_size, "64M", "a multiple of 4096 bytes, at least 8M",
            "size of a new journal segment", "up"),
    Setting("cut", values.cut, list, ["checkpoint", "5min", "1G"], 'a list of "checkpoint", "rate", periods and sizes',
            "when an interval is closed: at Postgres's own checkpoints, after a period, after that many bytes",
            "agent"),
    Setting("apply", values.choice("optimal", "replay"), str, "optimal", '"optimal" or "replay"',
            "how the image moves: each block once, or every write in order", "agent"),
    Setting("on_full", values.choice("stall", "track"), str, "stall", '"stall" or "track"',
            "what happens when the journal cannot grow: writes wait, or go on with their blocks noted, as a gap", "up"),
    Setting("fs", values.choice("ext4", "xfs"), str, "ext4", '"ext4" or "xfs"', "filesystem of the volumes", "fixed"),
    Setting("compression_level", values.number(1, 19), int, 1, "a number from 1 to 19",
            "zstd level of what is stored", "agent"),
    Setting("fence_after", values.duration, exact_duration, "30s", "a period of at least 1s, such as 30s or 2min",
            "how long an open view may take to learn that the image moves; then it is fenced: reading it is an error",
            "agent"),
    Setting("keep_writes", values.period, values.exact_period, "all", _PERIODS,
            "how far back, from the newest boundary, any single write can be restored", "now"),
    Setting("keep_boundaries", values.period, values.exact_period, "all", _PERIODS,
            "how far back every boundary can be restored", "now"),
    Setting("keep_hourly", values.period, values.exact_period, "all", _PERIODS,
            "how far back the newest boundary of each hour (UTC) can be restored", "now"),
    Setting("keep_daily", values.period, values.exact_period, "all", _PERIODS,
            "how far back the newest boundary of each day (UTC) can be restored; nothing before that is kept", "now"),
    Setting("least_free", values.size(0, 1), exact_size, "0", "a size such as 20G, or 0",
            "bytes that shall be free where the store is: below that the oldest goes before its time", "now"),
    Setting("encrypt_key_file", values.optional_path, values.path_or_nothing, "", "an absolute path, or an empty text",
            "file with the key of an encrypted store, 64 hex digits; whether a store is encrypted, protect decides",
            "agent"),
    Setting("encrypt_key_command", values.text, str, "", "a command of the shell, or an empty text",
            "or a command that prints this key", "agent"),
    Setting("metrics_listen", values.address, str, "off", _ADDRESSES,
            "where the agent serves metrics for Prometheus; whoever gets there may read them", "agent"),
    Setting("scrub_every", values.often, values.exact_often, "7d", '"never", or a period of at least 1s such as 7d',
            "how often the agent reads all of the store and checks every checksum, in the background", "now"),
    Setting("scrub_rate", values.size(0, 1), exact_size, "32M", "a size such as 32M, or 0 for as fast as it goes",
            "bytes a second that such a scrub, and check --full, read at most", "now"),
    Setting("verify_boundaries", values.flag, bool, False, "true or false",
            "whether the agent proves each boundary as it is cut, as verify does, giving way to all other work", "now"),
    Setting("cluster.version", values.number(13, 99), int, None, "a major version from 13",
            "major version of Postgres", "fixed"),
    Setting("cluster.bindir", values.path, str, None, _PATHS, "directory of its programs", "up"),
    Setting("cluster.owner", values.text, str, None, "a user name", "operating system user that runs it", "up"),
    Setting("cluster.port", values.number(1, 65535), int, None, "a number from 1 to 65535", "its port", "up"),
    Setting("cluster.socket_directory", values.text, str, None, "a path, or an empty text for none",
            "directory of its Unix socket", "up"),
    Setting("cluster.command_line", values.command_line, list, None,
            "a list of texts that begins with an absolute path", "command line that Postgres is started with", "up"),
    Setting("cluster.log_file", values.path, str, None, _PATHS, "where the output of postgres goes", "up"),
    Setting("cluster.system_identifier", values.matching("[0-9]{1,20}"), str, None, "a text of digits",
            "system identifier of the cluster, as text since it has 64 bits", "fixed"),
    Setting("cluster.was_running", values.flag, bool, True, "true or false", "whether it ran before protect", "fixed"),
    Setting("volumes.name", values.matching("[a-z0-9][a-z0-9_-]{0,31}"), str, None, "up to 32 of a-z, 0-9, _ and -",
            "name of the volume", "fixed"),
    Setting("volumes.backing", values.path, str, None, _PATHS, "image file or block device under it", "fixed"),
    Setting("volumes.device", values.flag, bool, False, "true or false",
            "whether the backing is a block device", "fixed"),
    Setting("volumes.fs", values.choice("ext4", "xfs"), str, None, '"ext4" or "xfs"', "its filesystem", "fixed"),
    Setting("volumes.mountpoint", values.path, str, None, _PATHS, "where it is mounted", "fixed"),
    Setting("volumes.bytes", values.size(4096), exact_size, None, _SIZES, "its size", "fixed"),
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


def check_value(name: str, value: Any) -> Any:
    """`value` as the setting's type (what CLI options are read with). Raises UsageError."""
    row = setting(name)
    try:
        return row.read(value)
    except ValueError:
        option = "--" + row.key.replace("_", "-")
        raise UsageError(f"{option} is {value!r}", f"{option} must be {row.allowed}") from None


def documentation() -> list[tuple[str, str, str, str]]:
    """(name, default, help, when it takes effect) of each setting, for docs and help."""
    return [
        (row.name, "" if row.default is None else str(row.default), row.help, EFFECTS[row.effect]) for row in SETTINGS
    ]
