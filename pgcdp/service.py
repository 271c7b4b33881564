"""The agent's process: started beside a set, asked over its socket, stopped with it."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from pgcdp.config import Config
from pgcdp.errors import BugError, DamageError, PgcdpError, PreconditionError, TargetError, UsageError
from pgcdp.sets import SetPaths

_BY_CODE: dict[int, type[PgcdpError]] = {2: UsageError, 3: TargetError, 5: DamageError, 6: PreconditionError}
START_SECONDS = 60.0
KEEP_SECONDS = 1.0
"""How often `kept` looks whether the agent runs."""
_children: list[subprocess.Popen[bytes]] = []
"""Agents that this process started: kept, so that their ends are collected when the next one starts."""


class AgentGone(PreconditionError):
    """No agent answers at the set's socket."""


def ask(paths: SetPaths, command: str, timeout: float | None = 60.0, **arguments: Any) -> dict[str, Any]:
    """One request to the set's agent. Raises AgentGone, or the error that it names."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as door:
            door.settimeout(timeout)
            door.connect(os.fspath(paths.agent_socket))
            door.sendall(json.dumps({"cmd": command, **arguments}).encode() + b"\n")
            with door.makefile("rb") as answers:
                line = answers.readline()
    except TimeoutError:
        raise PreconditionError(
            f"the agent did not answer {command} in {timeout} s", f"look at {paths.agent_log}"
        ) from None
    except OSError as error:
        raise AgentGone(f"no agent runs for set {paths.name}: {error.strerror}", f"pgcdp up {paths.name}") from None
    if not line.endswith(b"\n"):  # nothing, or a part of it
        raise AgentGone(f"the agent of set {paths.name} ended meanwhile", f"look at {paths.agent_log}")
    reply = json.loads(line)
    if not isinstance(reply, dict):
        raise BugError(f"the agent's answer to {command} is not an object")
    if "error" in reply and isinstance(reply["error"], dict):
        kind = _BY_CODE.get(int(reply["error"]["code"]), PgcdpError)
        raise kind(str(reply["error"]["message"]), reply["error"]["hint"])
    return reply


def await_following(paths: SetPaths) -> None:
    """Wait until an agent that has just started follows the journal.

    Raises PreconditionError when it does not, with what it says.
    """
    deadline = time.monotonic() + START_SECONDS
    while True:
        state = ask(paths, "status")
        if state["phase"] == "following" and not state["error"]:
            return
        if state["error"] or state["phase"] != "starting" or time.monotonic() > deadline:
            raise PreconditionError(
                f"the agent does not follow: {state['error'] or state['phase']}", f"see pgcdp status {paths.name}"
            )
        time.sleep(0.05)


def start(config: Config) -> None:
    """Start the agent in a session of its own, unless it runs; wait until it answers."""
    paths = config.paths
    try:
        ask(paths, "status")
        return
    except AgentGone:
        pass
    log = os.open(paths.agent_log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        begin = os.fstat(log).st_size
        child = subprocess.Popen(
            [sys.executable, "-m", "pgcdp", "agent", config.name],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            start_new_session=True,
        )
    finally:
        os.close(log)
    _children[:] = [*(each for each in _children if each.poll() is None), child]
    _await(config, child, begin)


@contextmanager
def kept(config: Config) -> Iterator[None]:
    """An agent runs inside: without one, what is written waits for room in the journal without end."""
    ended = threading.Event()

    def keep() -> None:
        while not ended.wait(KEEP_SECONDS):
            with suppress(PgcdpError, OSError):  # it is tried again; without this thread nobody would
                start(config)

    keeper = threading.Thread(target=keep, daemon=True)
    keeper.start()
    try:
        yield
    finally:
        ended.set()
        keeper.join()


def _await(config: Config, child: subprocess.Popen[bytes], begin: int) -> None:
    ended = os.pidfd_open(child.pid)
    deadline = time.monotonic() + START_SECONDS
    try:
        while True:
            try:
                ask(config.paths, "status")
                return
            except AgentGone:
                pass
            if select.select([ended], [], [], 0.05)[0] or time.monotonic() > deadline:
                child.poll()
                with config.paths.agent_log.open("rb") as log:
                    log.seek(begin)
                    lines = log.read().decode("utf-8", "replace").strip().splitlines()
                said = next(
                    (line for line in lines if line.startswith("error:")), lines[-1] if lines else "it said nothing"
                )
                raise PreconditionError(
                    f"the agent of set {config.name} did not start: {said.removeprefix('error:').strip()}",
                    f"look at {config.paths.agent_log}",
                )
    finally:
        os.close(ended)


def stop(config: Config, timeout: float = 600.0) -> None:
    """Have the agent finish its step and end; waits for that. Harmless when none runs."""
    try:
        pid = int(ask(config.paths, "status")["pid"])
        ended = os.pidfd_open(pid)
    except (AgentGone, ProcessLookupError):
        return
    try:
        ask(config.paths, "stop")
        if not select.select([ended], [], [], timeout)[0]:
            raise PreconditionError(
                f"the agent (pid {pid}) did not end in {timeout:g} s", f"look at {config.paths.agent_log}"
            )
    except AgentGone:
        pass
    finally:
        os.close(ended)
