"""Lead TCP connections into the network of an isolated Postgres. A script of its own: no import from pgcdp.

    python -I forward.py LISTENER PID PORT UID GID

LISTENER is the number of an inherited socket that listens on this machine's loopback; what connects to it is led to
127.0.0.1:PORT of the network namespace that process PID lives in, as a plain copy of bytes in both directions. A socket
belongs to the namespace that it was made in, so one process can stand in both. It ends when PID does.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import socket
import sys

CLONE_NEWNET = 0x40000000
_PIECE = 1 << 16

_libc = ctypes.CDLL(None, use_errno=True)


def main(argv: list[str]) -> None:
    """Enter the namespace, give up every right, and copy."""
    listener, pid, port, uid, gid = (int(word) for word in argv[1:6])
    ended = os.pidfd_open(pid)
    namespace = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    if _libc.setns(namespace, CLONE_NEWNET) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"setns: {os.strerror(code)}")
    os.close(namespace)
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    os.chdir("/")
    with socket.socket(fileno=listener) as door:
        asyncio.run(_serve(door, ended, port))


async def _serve(door: socket.socket, ended: int, port: int) -> None:
    over = asyncio.Event()
    asyncio.get_running_loop().add_reader(ended, over.set)
    clients: set[asyncio.Task[None]] = set()

    async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        clients.add(task)
        task.add_done_callback(clients.discard)
        await _lead(reader, writer, port)

    server = await asyncio.start_server(accepted, sock=door)
    await over.wait()
    server.close()
    for task in clients:
        task.cancel()


async def _lead(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port: int) -> None:
    try:
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        writer.close()
        return
    await asyncio.gather(_copy(reader, inner_writer), _copy(inner_reader, writer))


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(_PIECE):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    finally:
        writer.close()


if __name__ == "__main__":
    try:
        main(sys.argv)
    except OSError as failed:
        sys.exit(f"cannot forward: {failed.strerror or failed}")
