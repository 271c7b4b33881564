"""Run one program where it can write nothing but what it was given. A script of its own: no import from pgcdp.

    python -I isolate.py ORDER PROGRAM ARGUMENT ...

where ORDER is '{"keep": [...], "bind": [...], "hide": [...], "uid": N, "gid": N, "groups": [...]}'.

Why the settings of a sandbox are not enough: Postgres follows absolute paths that lie in the data itself. Replaying a
CREATE TABLESPACE makes a link to production's directory again and writes through it; replaying a DROP TABLESPACE
removes files there. So the program gets

- a mount namespace in which every mount is read-only except the directories `keep` (bound onto themselves) and a
  private /dev/shm; mounts of loop devices and FUSE that it does not need are gone (production's protected volumes are
  such mounts, and a namespace that held them would keep `pgcdp down` from detaching); the directories `hide` and those
  of every Postgres socket of this machine are covered by an empty one: sockets with a path are not part of the network
  namespace, and a foreign table of the image's would lead through one into production; in place of production's
  directories, as far as this machine has such, stand those that `bind` names, [its own, production's]: replaying a
  CREATE TABLESPACE, which bears production's path, goes there;
- an IPC namespace, so that no shared memory is left and no key collides;
- a network namespace with a loopback of its own only: what the image's triggers, subscriptions and foreign servers
  try to reach cannot be reached;
- the user's identity, and no way to gain another;
- where the kernel has Landlock's scopes (6.12): no signal to, and no look into, any process but its own. Production
  runs as the same user, and /proc/PID/root of one of its processes would lead around all of the walls above.

The process id stays the same throughout. Needs CAP_SYS_ADMIN and Linux 5.12 (mount_setattr).
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import socket
import struct
import sys
from collections.abc import Iterable
from contextlib import suppress

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWNET = 0x00020000, 0x08000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 4096, 16384, 1 << 18
MNT_DETACH = 2
SYS_MOUNT_SETATTR = 442  # the same number on all architectures
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
MOUNT_ATTR_RDONLY = 1
PR_SET_NO_NEW_PRIVS = 38
SYS_LANDLOCK_CREATE_RULESET, SYS_LANDLOCK_RESTRICT_SELF = 444, 446
LANDLOCK_VERSION = 1  # a flag: tell the version
LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET, LANDLOCK_SCOPE_SIGNAL = 1, 2
LANDLOCK_HAS_SCOPES = 6
SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/sbin", "/etc", "/proc", "/dev", "/sys")

_libc = ctypes.CDLL(None, use_errno=True)


def main(argv: list[str]) -> None:
    """Build the namespaces and become the program."""
    order = json.loads(argv[1])
    program = argv[2:]
    sockets = _socket_directories()
    keep = [os.path.realpath(path) for path in order["keep"]]
    needed = [*keep, *SYSTEM, os.path.realpath(os.path.dirname(os.path.dirname(program[0])))]
    _call("unshare", _libc.unshare(CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWNET))
    _mount(None, "/", None, MS_REC | MS_PRIVATE)
    _loopback_up()
    _drop_unneeded(needed, keep)
    _read_only_but(keep)
    for path in dict.fromkeys(os.path.realpath(each) for each in (*order["hide"], *sockets)):
        _hide(path, keep, needed)
    for own, place in order["bind"]:
        if os.path.isdir(place):
            _mount(own, place, None, MS_BIND)
    os.setgroups(order["groups"])
    os.setresgid(order["gid"], order["gid"], order["gid"])
    os.setresuid(order["uid"], order["uid"], order["uid"])
    _call("prctl", _libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    _keep_from_others()
    os.umask(0o077)
    os.chdir("/")
    os.execv(program[0], program)


def _call(name: str, result: int) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    words = [None if word is None else os.fsencode(word) for word in (source, target, kind, data)]
    result = _libc.mount(words[0], words[1], words[2], ctypes.c_ulong(flags), words[3])
    _call(f"mount {target}", result)


def _set_attributes(path: str, add: int, remove: int) -> None:
    attributes = struct.pack("=QQQQ", add, remove, 0, 0)
    result = _libc.syscall(
        ctypes.c_long(SYS_MOUNT_SETATTR),
        ctypes.c_int(AT_FDCWD),
        ctypes.c_char_p(os.fsencode(path)),
        ctypes.c_uint(AT_RECURSIVE),
        ctypes.c_char_p(attributes),
        ctypes.c_size_t(len(attributes)),
    )
    _call(f"mount_setattr {path}", result)


def _below(path: str, directory: str) -> bool:
    return path == directory or path.startswith(directory.rstrip("/") + "/")


def _mounts() -> Iterable[tuple[str, str, str]]:
    """(mount point, filesystem type, source) of this namespace."""
    with open("/proc/self/mountinfo", "rb") as file:
        for line in file:
            left, _, right = line.partition(b" - ")
            point = left.split()[4].decode("unicode_escape").encode("latin-1")
            kind, source = right.split()[:2]
            yield os.fsdecode(point), os.fsdecode(kind), os.fsdecode(source)


def _drop_unneeded(needed: list[str], keep: list[str]) -> None:
    """Detach mounts of loop devices and FUSE that hold nothing needed, here only.

    What is mounted inside of a directory that is kept is a part of that: pg_wal's volume in the data directory.
    """
    for point, kind, source in reversed(list(_mounts())):
        if not (source.startswith("/dev/loop") or kind.startswith("fuse")):
            continue
        holds = any(_below(path, point) for path in needed) or any(_below(point, each) for each in keep)
        if point != "/" and not holds:
            _libc.umount2(os.fsencode(point), MNT_DETACH)  # gone already when what it lies on went before


def _read_only_but(keep: list[str]) -> None:
    for path in keep:
        _mount(path, path, None, MS_BIND | MS_REC)
    _set_attributes("/", MOUNT_ATTR_RDONLY, 0)
    for path in keep:
        _set_attributes(path, 0, MOUNT_ATTR_RDONLY)
    _mount("tmpfs", "/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777")


def _hide(path: str, keep: list[str], needed: list[str]) -> None:
    """Cover a directory with an empty one, unless it lies in one that is kept; only its sockets, if it holds such."""
    if not os.path.isdir(path) or any(_below(path, each) for each in keep):
        return
    if not any(_below(each, path) for each in needed):
        with suppress(FileNotFoundError):  # its server has just gone, and removed it
            _mount("tmpfs", path, "tmpfs", MS_RDONLY | MS_NOSUID | MS_NODEV, "mode=000,size=4k")
        return
    for name in os.listdir(path):
        if name.startswith(".s.PGSQL."):
            with suppress(FileNotFoundError):
                _mount("/dev/null", os.path.join(path, name), None, MS_BIND)


def _socket_directories() -> list[str]:
    """Those of all servers of Postgres that run now, and those where they are by default."""
    found = ["/run/postgresql", "/var/run/postgresql", "/tmp"]
    with open("/proc/net/unix", "rb") as file:
        for line in file:
            path = line.rstrip(b"\n").split(maxsplit=7)[7:]
            if path and path[0].startswith(b"/") and os.path.basename(path[0]).startswith(b".s.PGSQL."):
                found.append(os.fsdecode(os.path.dirname(path[0])))
    return found


def _keep_from_others() -> None:
    """No signals to processes outside of this one and its children, nor their /proc/PID/root, cwd, fd, mem."""
    create = ctypes.c_long(SYS_LANDLOCK_CREATE_RULESET)
    if _libc.syscall(create, None, ctypes.c_size_t(0), ctypes.c_uint32(LANDLOCK_VERSION)) < LANDLOCK_HAS_SCOPES:
        return
    wanted = struct.pack("=QQQ", 0, 0, LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET | LANDLOCK_SCOPE_SIGNAL)
    rules = _libc.syscall(create, ctypes.c_char_p(wanted), ctypes.c_size_t(len(wanted)), ctypes.c_uint32(0))
    _call("landlock_create_ruleset", min(rules, 0))
    restrict = ctypes.c_long(SYS_LANDLOCK_RESTRICT_SELF)
    _call("landlock_restrict_self", _libc.syscall(restrict, ctypes.c_int(rules), ctypes.c_uint32(0)))
    os.close(rules)


def _loopback_up() -> None:
    """The statistics collector of PostgreSQL 13 and 14 talks to itself over loopback."""
    get, put, up = 0x8913, 0x8914, 1
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sH14x", b"lo", 0)
        flags = struct.unpack("16sH14x", fcntl.ioctl(any_socket, get, request))[1]
        fcntl.ioctl(any_socket, put, struct.pack("16sH14x", b"lo", flags | up))


if __name__ == "__main__":
    try:
        main(sys.argv)
    except OSError as failed:
        sys.exit(f"cannot isolate: {failed.strerror or failed}")
