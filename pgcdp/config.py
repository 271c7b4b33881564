"""The settings of one volume set: Config, reading it from SET.toml and writing it there, as SETTINGS lists them."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tomlkit

from pgcdp import fsio, keys
from pgcdp.errors import PreconditionError, UsageError
from pgcdp.sets import SetPaths, list_sets, root_directory, set_paths
from pgcdp.settings_table import EFFECTS, SETTINGS, Setting
from pgcdp.units import exact_size


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
    on_full: Literal["stall", "track"] = "stall"
    fs: Literal["ext4", "xfs"] = "ext4"
    compression_level: int = 1
    fence_after: float = 30.0
    keep_writes: float | None = None
    keep_boundaries: float | None = None
    keep_hourly: float | None = None
    keep_daily: float | None = None
    least_free: int = 0
    encrypt_key_file: Path | None = None
    encrypt_key_command: str = ""
    metrics_listen: str = "off"
    scrub_every: float | None = 7 * 86400.0
    scrub_rate: int = 32 << 20
    verify_boundaries: bool = False
    root: Path = field(default_factory=lambda: root_directory())

    @property
    def paths(self) -> SetPaths:
        return SetPaths(self.root, self.name)

    @property
    def set_id_bytes(self) -> bytes:
        """The 16 bytes that every file of the set carries."""
        return bytes.fromhex(self.set_id)


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
    """Config of the text of SET.toml; `file` is for messages. Raises UsageError.

    Where the key of the set's store is, this process knows from then on (`keys`).
    """
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
    keys.know(config.store, keys.source(config.encrypt_key_file, config.encrypt_key_command))
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
