"""What must be so before a cluster is put behind capture. Everything here only looks; nothing is changed."""

from __future__ import annotations

import os
import secrets
import shlex
import shutil
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pgcdp import config as settings
from pgcdp import fsio, keys, proc, twice
from pgcdp.capture import kernel, places, planning, promises, volumes
from pgcdp.capture.engine import find_engine
from pgcdp.capture.planning import Backing
from pgcdp.capture.promises import nearest_existing
from pgcdp.config import ClusterConfig, Config, VolumeConfig
from pgcdp.errors import DamageError, PreconditionError, UsageError
from pgcdp.machine import Place
from pgcdp.postgres import cluster, ports
from pgcdp.records import Remark
from pgcdp.sets import SetPaths, set_paths
from pgcdp.settings_table import check_value
from pgcdp.units import format_size

PROGRAMS = {
    "losetup": "util-linux",
    "mount": "mount",
    "umount": "mount",
    "wipefs": "util-linux",
    "mkfs.ext4": "e2fsprogs",
    "mkfs.xfs": "xfsprogs",
    "fusermount3": "fuse3",
}
INITDB_BYTES = 128 << 20
"""Room that a fresh cluster and its first WAL need."""


@dataclass(frozen=True, slots=True)
class ProtectRequest:
    """What `pgcdp protect` is asked for. Exactly one of `volume` (a block device) and `size` (bytes of an image file).

    `wal_volume` or `wal_size` give pg_wal a volume of its own, `tablespaces` each of these (by name, or OID), in the
    same write order; `fs_of` are filesystems of volumes that differ from `fs`. `journal` defaults to the set's state
    directory, `bindir` to the programs of the cluster's version. `stop_seconds` is how long the cluster
    may take to stop. With `encrypt_key_file` or `encrypt_key_command` the store is encrypted. `initdb` makes a new
    cluster at `pgdata`, of `version` (or the newest that is installed), owned by `owner`, with these options of initdb
    and these lines at the end of its postgresql.conf.
    """

    name: str
    pgdata: Path
    store: Path
    volume: Path | None = None
    size: int | None = None
    wal_volume: Path | None = None
    wal_size: int | None = None
    tablespaces: tuple[tuple[str, Backing], ...] = ()
    fs: str = "ext4"
    fs_of: tuple[tuple[str, str], ...] = ()
    journal: Path | None = None
    journal_limit: int | None = None
    segment_size: int | None = None
    cut: tuple[str, ...] | None = None
    apply: str | None = None
    compression_level: int | None = None
    encrypt_key_file: Path | None = None
    encrypt_key_command: str | None = None
    bindir: Path | None = None
    stop_seconds: float = 600.0
    initdb: bool = False
    initdb_options: tuple[str, ...] = ("--data-checksums", "--auth-local=peer", "--auth-host=scram-sha-256")
    settings: tuple[tuple[str, str], ...] = ()
    version: int | None = None
    owner: str = "postgres"
    yes: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """What protect will do: the settings to be, how it is now, and what the promise holds but for."""

    config: Config
    was_running: bool
    warnings: tuple[Remark, ...] = ()


def check_machine(filesystems: Collection[str]) -> None:
    """FUSE, loop devices, the engine, the programs that are needed. Raises PreconditionError for the first missing."""
    for node, module in kernel.NODES:
        try:
            os.close(os.open(node, os.O_RDWR | os.O_CLOEXEC))
        except OSError as error:
            raise PreconditionError(f"cannot open {node}: {error.strerror}", f"modprobe {module}") from None
    check_programs(filesystems)


def check_programs(filesystems: Collection[str]) -> None:
    """The engine and the programs that are needed. Raises PreconditionError for the first missing."""
    for program, package in PROGRAMS.items():
        if program.startswith("mkfs.") and program.removeprefix("mkfs.") not in filesystems:
            continue
        if shutil.which(program) is None:
            raise PreconditionError(f"{program} is not installed", f"apt-get install {package}")
    find_engine()


def check_name(paths: SetPaths) -> None:
    """Raises PreconditionError when the set exists or left something behind."""
    if paths.config_file.exists():
        raise PreconditionError(
            f'the set "{paths.name}" exists already', "choose another name, or pgcdp unprotect it first"
        )
    if paths.volumes.is_dir() and any(paths.volumes.iterdir()):
        raise PreconditionError(
            f"{paths.volumes} is not empty", "choose another name, or remove what an earlier set left"
        )


def check_places(request: ProtectRequest, places: Sequence[Path], journal: Path) -> None:
    """Store and journal: outside the cluster's directories, apart from each other, empty or absent.

    The store can be made.
    """
    for what, place in (("store", request.store), ("journal", journal)):
        if not place.is_absolute():
            raise UsageError(f"{what} {place} is not an absolute path", f"give --{what} as an absolute path")
        real = Path(os.path.realpath(place))
        for number, each in enumerate(places):
            if real.is_relative_to(os.path.realpath(each)):
                raise PreconditionError(
                    f"{what} {place} is inside the {'tablespace' if number else 'data'} directory {each}",
                    f"choose a --{what} elsewhere, best on another disk",
                )
        if twice.STORE.exists(place):
            raise PreconditionError(
                f"{place} is the store of {_owner_of(place)}", f"choose an empty --{what} directory"
            )
        if place.exists() and (not place.is_dir() or any(place.iterdir())):
            raise PreconditionError(f"{what} {place} exists and is not empty", f"choose an empty --{what} directory")
    if not request.store.parent.is_dir():
        raise PreconditionError(
            f"store {request.store} cannot be made: {request.store.parent} does not exist",
            f"mount what belongs there, or mkdir -p {request.store.parent}",
        )
    one, other = Path(os.path.realpath(request.store)), Path(os.path.realpath(journal))
    if one == other or one in other.parents or other in one.parents:
        raise PreconditionError(f"store {one} and journal {other} lie in each other", "choose separate directories")


def _owner_of(store: Path) -> str:
    """The set, cluster and machine that a store is of, as far as it tells."""
    try:
        said = twice.STORE.read(store)
        told = f"set {said['set']} ({said['set_id']}), cluster {said['cluster']['system_identifier']}"
        return f"{told}, on {Place.of(fsio.read_json(store / 'owner.json')['place'])}"
    except (DamageError, KeyError, TypeError):
        return "another set, and damaged"
    except FileNotFoundError:
        return told


def need_space(place: Path, need: int, what: str, option: str | None) -> None:
    """Raises PreconditionError when the filesystem of `place` has less than `need` bytes for `what`."""
    free = fsio.free_space(nearest_existing(place))
    if free < need:
        raise PreconditionError(
            f"{what} needs {format_size(need)}, but {place} has {format_size(free)} free",
            f"free space there, or choose another {option}" if option else "free space there",
        )


def check_space(wanted: list[tuple[str, Path, int, str]]) -> None:
    """Space for (what, where, bytes, option), summed over those that share a filesystem."""
    claims: dict[int, list[tuple[str, Path, int, str]]] = defaultdict(list)
    for claim in wanted:
        claims[nearest_existing(claim[1]).stat().st_dev].append(claim)
    for shared in claims.values():
        need = sum(claim[2] for claim in shared)
        names = " and ".join(f"{what} ({format_size(size)})" for what, _, size, _ in shared)
        options = " or ".join(dict.fromkeys(option for _, _, _, option in shared))
        need_space(shared[0][1], need, names, options)


def planned_volumes(
    request: ProtectRequest, paths: SetPaths, pgdata: Path, facts: ClusterConfig, running: bool
) -> tuple[VolumeConfig, ...]:
    """The volumes to be, checked. Raises UsageError, PreconditionError."""
    if request.initdb and request.tablespaces:
        raise UsageError(
            "--tablespace and --initdb cannot be given together: a new cluster has no tablespaces",
            f"make it first, CREATE TABLESPACE in it, then pgcdp protect {request.name} --tablespace NAME=SIZE",
        )
    wal = Backing(request.wal_volume, request.wal_size)
    found = planning.wishes(
        pgdata,
        Backing(request.volume, request.size),
        None if wal == (None, None) else wal,
        request.tablespaces,
        [] if request.initdb else planning.spaces_of(pgdata, facts, running),
        request.fs,
        dict(request.fs_of),
    )
    if not request.initdb:
        mountpoints = [wish.mountpoint for wish in found]
        planning.check_places([place for place in mountpoints if not place.is_relative_to(pgdata)], [pgdata])
        planning.refuse_outside(pgdata, mountpoints)
    return tuple(planning.planned(found, paths.volumes, request.yes))


def check(request: ProtectRequest) -> Plan:
    """All checks of protect, in the order in which a user would mend them. Changes nothing.

    Raises UsageError for a wrong request, PreconditionError for what must be mended first.
    """
    paths = set_paths(request.name)
    check_name(paths)
    check_machine({request.fs, *dict(request.fs_of).values()})
    if not request.pgdata.is_absolute():
        raise UsageError(f"{request.pgdata} is not an absolute path", "give --pgdata as an absolute path")
    pgdata = Path(os.path.realpath(request.pgdata))
    holder = settings.set_of_pgdata(pgdata)
    if holder is not None:
        raise PreconditionError(f'{pgdata} is already protected by the set "{holder}"', f"see pgcdp status {holder}")
    journal = request.journal or paths.journal
    warnings: list[Remark] = []
    if request.initdb:
        facts, running = _facts_of_new(request, pgdata, paths), False
    else:
        planning.refuse_mounts(pgdata, "move the cluster into a directory below the mount point first")
        facts, running = facts_of(pgdata, request.bindir, paths.state)
        warnings += promises.refuse(promises.of_cluster(pgdata, facts, running))
    if not running:
        check_port(request, facts)
    planned = planned_volumes(request, paths, pgdata, facts, running)
    config = _config(request, pgdata, journal, planned, facts)
    check_places(request, places.places(config), journal)
    keys.refuse_captured(keys.source_of(config.store), places.places(config))
    keys.user_key_for(config.store)
    for place in places.places(config):
        for aside in (places.before(place, config.name), places.plain(place, config.name)):
            if os.path.lexists(aside):
                raise PreconditionError(f"{aside} exists", "it is left from an earlier run: move it away or remove it")
    sizes = [(planned[0], INITDB_BYTES)] if request.initdb else list(places.contents(config))
    for volume, size in sizes:
        if volume.bytes < size + size // 20:
            raise PreconditionError(
                f"{volume.mountpoint} has {format_size(size)}, which does not fit on a volume of "
                f"{format_size(volume.bytes)}",
                f"choose a larger {size_option(volume)}",
            )
    data = sum(size for _, size in sizes)
    images = [
        (f"the {volume.name} volume", volume.backing, volume.bytes, size_option(volume))
        for volume in planned
        if not volume.device
    ]
    check_space(
        [
            *images,
            ("the journal", journal, config.journal_limit, "--journal or --journal-limit"),
            ("the store", request.store, data + data // 10, "--store"),
        ]
    )
    warnings += promises.refuse(promises.of_places(config))
    return Plan(config, running, tuple(warnings))


def size_option(volume: VolumeConfig) -> str:
    """With which option its size was given."""
    return {planning.DATA: "--size", planning.WAL: "--wal-volume"}.get(volume.name, "--tablespace")


def check_port(request: ProtectRequest, facts: ClusterConfig) -> None:
    """A cluster that does not run could be started. Raises PreconditionError that names who has its port."""
    user = proc.user_named(facts.owner)
    if request.initdb:
        place = ports.of_new(cluster.Binaries(facts.bindir, facts.version), dict(request.settings), user)
    else:
        place = ports.of_cluster(facts.command_line, user)
    taken = place.taken()
    if taken is not None:
        raise PreconditionError(
            f"port {place.port} of the cluster is taken: {taken}",
            "choose another with --port" if request.initdb else "end that, or give the cluster another port",
        )


def _config(
    request: ProtectRequest, pgdata: Path, journal: Path, planned: tuple[VolumeConfig, ...], facts: ClusterConfig
) -> Config:
    given = {
        key: check_value(key, value)
        for key in ("journal_limit", "segment_size", "cut", "apply", "compression_level", "encrypt_key_command")
        if (value := getattr(request, key)) is not None
    }
    if request.encrypt_key_file is not None:
        given["encrypt_key_file"] = check_value("encrypt_key_file", str(request.encrypt_key_file))
    config = Config(
        name=request.name,
        set_id=secrets.token_hex(16),
        pgdata=pgdata,
        store=Path(os.path.realpath(request.store)),
        journal=Path(os.path.realpath(journal)),
        volumes=planned,
        cluster=facts,
        fs=check_value("fs", request.fs),
        **given,
    )
    return settings.parse_config(settings.render_config(config), request.name, config.paths.config_file, config.root)


def _binaries(given: Path | None, major: int, prefer: Path | None, user: proc.User) -> cluster.Binaries:
    if given is not None and (found := cluster.version_of(given, user)) != major:
        holds = f"holds PostgreSQL {found}" if found else "holds no PostgreSQL"
        raise PreconditionError(
            f"the cluster is of PostgreSQL {major}, but {given} {holds}",
            f"give the directory of the programs of PostgreSQL {major}",
        )
    return cluster.find_binaries(major, given or prefer, user)


def facts_of(pgdata: Path, bindir: Path | None, state: Path) -> tuple[ClusterConfig, bool]:
    """What is known of a cluster that is there, and whether it runs. `state`: where its log goes when it has none.

    Raises PreconditionError.
    """
    found = cluster.inspect(pgdata)
    if found.user.uid == 0:
        raise PreconditionError(
            f"{pgdata} belongs to root, as whom Postgres does not run", f"chown -R postgres {pgdata}"
        )
    running = found.postmaster
    own = Path(running.argv[0]).parent if running and running.argv else None
    binaries = _binaries(bindir, found.major, own, found.user)
    argv = running.argv if running else _last_command_line(binaries, pgdata)
    if running and running.port is not None:
        port, socket = running.port, running.socket_directory
    else:
        port, socket = int(cluster.ask_setting(argv, "port", found.user)), _ask_socket_directory(argv, found.user)
    log_file = running.log_file if running and running.log_file else state / "postgres.log"
    if pgdata in log_file.parents:
        log_file = state / "postgres.log"
    facts = ClusterConfig(
        version=found.major,
        bindir=binaries.directory,
        owner=found.user.name,
        port=port,
        socket_directory=os.fspath(socket) if socket else "",
        command_line=argv,
        log_file=log_file,
        system_identifier=str(found.system_identifier),
        was_running=running is not None,
    )
    return facts, running is not None


def _last_command_line(binaries: cluster.Binaries, pgdata: Path) -> tuple[str, ...]:
    """How a cluster that does not run ran last, by its postmaster.opts; the plain one when that does not tell."""
    try:
        words = shlex.split((pgdata / "postmaster.opts").read_text())
    except (OSError, ValueError):
        words = []
    if words and os.path.isabs(words[0]) and os.access(words[0], os.X_OK) and os.fspath(pgdata) in words:
        return tuple(words)
    if not (pgdata / "postgresql.conf").exists():
        raise PreconditionError(
            f"{pgdata} has no postgresql.conf and does not run, so its configuration is not known",
            "start the cluster as you always do, then protect it",
        )
    return cluster.command_line(binaries, pgdata)


def _ask_socket_directory(argv: tuple[str, ...], user: proc.User) -> Path | None:
    first = cluster.ask_setting(argv, "unix_socket_directories", user).split(",")[0].strip()
    return Path(first) if first else None


# --- a new cluster


def _facts_of_new(request: ProtectRequest, pgdata: Path, paths: SetPaths) -> ClusterConfig:
    user = proc.user_named(request.owner)
    if os.path.lexists(pgdata) and (not pgdata.is_dir() or any(pgdata.iterdir())):
        raise PreconditionError(f"{pgdata} exists and is not empty", "leave out --initdb to protect the cluster in it")
    if volumes.mount_at(pgdata) is not None:
        raise PreconditionError(f"{pgdata} is a mount point", "name a directory below it")
    if not pgdata.parent.is_dir():
        raise PreconditionError(f"{pgdata.parent} does not exist", f"mkdir -p {pgdata.parent}")
    if not cluster.can_enter(user, pgdata.parent):
        raise PreconditionError(
            f"user {user.name} cannot enter {pgdata.parent}",
            "choose a --pgdata that it can, or change the modes above it",
        )
    binaries = _binaries(request.bindir, _version_of_new(request, user), None, user)
    wanted = dict(request.settings)
    return ClusterConfig(
        version=binaries.major,
        bindir=binaries.directory,
        owner=user.name,
        port=int(wanted.get("port", "5432")),
        socket_directory=wanted.get("unix_socket_directories", "").split(",")[0].strip(),
        command_line=cluster.command_line(binaries, pgdata),
        log_file=paths.state / "postgres.log",
        system_identifier="0",
        was_running=False,
    )


def _version_of_new(request: ProtectRequest, user: proc.User) -> int:
    if request.version is not None:
        return request.version
    if request.bindir is not None:
        return cluster.version_of(request.bindir, user) or cluster.NEWEST
    for major in range(cluster.NEWEST, cluster.OLDEST, -1):
        try:
            return cluster.find_binaries(major, user=user).major
        except PreconditionError:
            continue
    return cluster.OLDEST


def make_cluster(request: ProtectRequest, config: Config) -> Config:
    """Run initdb at the data directory; returns the settings with what is known only afterwards.

    Raises ProcessFailed with initdb's own words.
    """
    facts = config.cluster
    user = proc.user_named(facts.owner)
    config.pgdata.mkdir(mode=0o700, exist_ok=True)
    os.chown(config.pgdata, user.uid, user.gid)
    cluster.initdb(cluster.Binaries(facts.bindir, facts.version), config.pgdata, user, *request.initdb_options)
    with (config.pgdata / "postgresql.conf").open("a") as file:
        file.writelines(f"{name} = '{value.replace(chr(39), chr(39) * 2)}'\n" for name, value in request.settings)
    socket = _ask_socket_directory(facts.command_line, user)
    facts = replace(
        facts,
        system_identifier=str(cluster.read_control(config.pgdata).system_identifier),
        port=int(cluster.ask_setting(facts.command_line, "port", user)),
        socket_directory=os.fspath(socket) if socket else "",
    )
    return replace(config, cluster=facts)


def remove_cluster(config: Config) -> None:
    """Undo make_cluster: the data directory goes with all that is in it."""
    shutil.rmtree(config.pgdata, ignore_errors=True)
